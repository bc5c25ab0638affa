/*
 * run.c - inference for Llama models on the CPU, in one file of plain C11.
 *
 *   cc -O3 -ffp-contract=off -o run run.c -lm -lpthread
 *   ./run model.bin -z data/tok4096.bin -i "Once upon a time" -t 0.8
 *   ./run --help
 *
 * Reads the layouts that export.py writes (the first three as llama2.c's): v0 and v1 hold fp32 weights, v2 int8
 * weights in groups that share one fp32 scale, v3 4-bit weights. The header says which.
 * Nothing in a file is believed before it is checked: sizes are computed with overflow checks and must equal
 * the file's real size, so a damaged file is one line on stderr and exit code 1.
 *
 * The matrix kernels are read several times, for each instruction set once: this file includes itself. With ISA
 * defined it is those kernels alone (the part at the end).
 *
 * Not for: training, other architectures, GPUs, big-endian machines.
 */
#ifndef ISA
#define _GNU_SOURCE  // sched_getaffinity
#define _FILE_OFFSET_BITS 64   // files above 2 GB on 32-bit systems
#define __USE_MINGW_ANSI_STDIO 1  // C's printf, not that of Windows

#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/stat.h>
#ifdef _WIN32
    #include <fcntl.h>
    #include <io.h>
    #include <windows.h>
    #define isatty _isatty
    #define fileno _fileno
#else
    #include <sys/mman.h>
    #include <sys/resource.h>
    #include <unistd.h>
#endif
#ifdef __APPLE__
    #include <sys/sysctl.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "model files are little-endian and are used in place: big-endian machines are not supported"
#endif
#ifdef __clang__
    #pragma STDC FP_CONTRACT OFF  // as -ffp-contract=off: a*b+c rounds alike on every machine
#endif

#ifndef CONTAINER
    #define CONTAINER "/sys/fs/cgroup/"  // where Linux shows a container its limits
#endif

enum { UNK = 0, BOS = 1, EOS = 2 };   // the ids of Llama's special tokens
enum { LANES = 16 };                  // floats in a vector, and rows of a matrix in a band
enum { BAND = 64 };                   // bytes of a vector: for each row of a band a float, or 4 int8
enum { GROUP4 = 32 };                 // 4-bit values that share a scale
enum { SMALL_MODEL = 32 << 20 };      // bytes of a file that a cache may hold: there reading is not what takes time
enum { LARGE_CACHE = 128 << 20 };     // bytes of keys and values that one text had better not take all at once
enum { PACK_ROWS = 64 };              // rows of input from which on fp32 weights are worth reordering

// ---------------------------------------------------------------------------------------------------------
// Structs

typedef struct {
    int dim;                 // width of the residual stream
    int hidden_dim;          // width inside the feed-forward block
    int n_layers;
    int n_heads;             // query heads
    int n_kv_heads;          // key/value heads, each shared by n_heads / n_kv_heads query heads
    int vocab_size;
    int seq_len;             // the longest context the model was trained for
    int head_size;           // dim / n_heads
    int kv_dim;              // n_kv_heads * head_size
    int bits;                // of a weight: 32 (fp32), 8 or 4
    int group_size;          // int8 or 4-bit values that share a scale; 0 for fp32
    size_t kv_bytes;         // of a number in a KVCache: 4 (fp32), or 2 (half floats) beside weights that are rounded
    bool shared_classifier;  // the classifier is the embedding table
    float rope_theta;
    float norm_eps;
} Config;

typedef struct {                  // a matrix (rows, cols)
    const float *f;               // fp32, row-major, in the file
    const unsigned char *q;       // or int8, row-major, in the file,
    const unsigned char *scale;   // with (rows, groups) float32; perhaps not aligned
    const unsigned char *values;  // what matmul reads, see pack(): (bands, groups, units, BAND) bytes; 4-bit: half
    const unsigned char *scales;  // (bands, groups, LANES) float32; 4-bit: half floats
    int rows, cols, bits;
    int group;                    // of a row, values that share a scale; 0 for fp32
    size_t groups, units;         // of a row; of a group, 4 bytes of one row each
} Tensor;

typedef struct {
    const float *rms_att;  // (dim,)
    Tensor wq;             // (dim, dim)
    Tensor wk, wv;         // (kv_dim, dim)
    Tensor wo;             // (dim, dim)
    const float *rms_ffn;  // (dim,)
    Tensor w1, w3;         // (hidden_dim, dim)
    Tensor w2;             // (dim, hidden_dim)
} Layer;

typedef struct {
    Tensor tok_embeddings;   // (vocab_size, dim)
    Layer *layers;           // (n_layers,)
    const float *rms_final;  // (dim,)
    Tensor wcls;             // (vocab_size, dim)
} Weights;

typedef struct {          // the input of a matmul
    float *f;             // (rows, width), cols rounded up to LANES with zeros behind
    int8_t *q;            // (rows, groups, 4 * units) quantize() makes this of f, and what follows; fp32: NULL
    float *scale;         // (rows, groups)
    int32_t *bias;        // (rows, groups) what a sum of products begins with: takes out the weights' offset
    size_t width, groups, units;
} Activation;

typedef struct {            // the keys and values of one text
    unsigned char *keys;    // (n_layers, n_kv_heads, room / LANES, head_size, LANES) of kv_bytes each: neighbouring
    unsigned char *values;  // positions lie together; the same
    size_t room;            // positions, a multiple of LANES
    void *block;            // in which both lie
} KVCache;

typedef struct {      // a token to feed: all positions of its text before pos were fed, or come before it here
    int token, pos;
    KVCache *cache;
} Row;

typedef struct {
    int rows;            // room for so many tokens at once
    float *x;            // (rows, dim) the residual stream
    Activation xb;       // (rows, dim) normalised x, then the heads' output
    Activation hb;       // (rows, hidden_dim)
    Activation *own;     // (threads,) a row for each thread, of dim or hidden_dim
    float *add;          // (rows, dim) what a block adds to x
    float *hb2;          // (rows, hidden_dim)
    float *q;            // (rows, n_heads, head_size)
    float *k, *v;        // (rows, n_kv_heads, head_size)
    float *scores;       // (threads, MAX_QUERIES, room)
    float *scratch;      // (threads, scratch_size) two bands of fp32 weights
    size_t scratch_size;
    float *logits;       // (logit_rows, vocab_width)
    int logit_rows;
    size_t vocab_width;  // vocab_size rounded up to LANES
    float *rope;         // (rows, head_size / 2, 2) cosine and sine
    size_t room;         // positions, in scores
} RunState;

typedef struct {      // a query head of a row, which sees all positions up to its own
    const float *q;   // (head_size,)
    float *out;       // (head_size,)
    int pos;
} Query;

enum { MAX_QUERIES = 4 };  // that attend one key/value head at once

typedef struct {      // one instruction set's; see there
    const char *name;
    void (*softmax)(float *x, int n);
    void (*rmsnorm)(float *out, const float *x, const float *weight, int n, float eps);
    void (*quantize)(Activation *x, int row, int cols, int group, int bits);
    void (*matmul)(const Tensor *w, const Activation *x, int n, float *out, size_t ldo, int from, int to,
                   float *scratch);
    void (*swiglu)(float *gate, const float *up, int n);
    void (*store_kv)(unsigned char *cache, size_t at, const float *v, int size, size_t kv_bytes);
    void (*attend)(int n, const Query *queries, const unsigned char *keys, const unsigned char *values,
                   size_t kv_bytes, size_t room, int size, float *scores);
    bool (*finite)(const float *x, int n);
    unsigned char weight_xor;  // packed int8 weights are xor this: 128 where the dot product wants them unsigned
} Kernels;

typedef struct {
    const char *path;
    const unsigned char *data;
    size_t size;
    bool mapped;  // by mmap, else malloc'ed
} File;

typedef struct {      // text by length: it may hold NUL bytes
    char *data;
    size_t len, cap;
} Text;

// ---------------------------------------------------------------------------------------------------------
// Errors, memory, files

// One line "run: SUBJECT: what is wrong" on stderr. The subject is a file or an option.
static void say(const char *subject, const char *format, va_list args) {
    char line[2048];
    int n = snprintf(line, sizeof line, "run: %.900s%s", subject, *subject ? ": " : "");
    if (n >= 0 && (size_t)n < sizeof line) vsnprintf(line + n, sizeof line - (size_t)n, format, args);
    for (char *c = line; *c; c++) {  // names come from the user: keep it one line, and no terminal escapes
        if ((unsigned char)*c < 32 || *c == 127) *c = '?';
    }
    fflush(stdout);  // what was said before stays before
    fprintf(stderr, "%s\n", line);
}

#ifdef __MINGW32__
    #define PRINTF __attribute__((format(gnu_printf, 2, 3)))
#else
    #define PRINTF __attribute__((format(printf, 2, 3)))
#endif

PRINTF static void warn(const char *subject, const char *format, ...) {
    va_list args;
    va_start(args, format);
    say(subject, format, args);
    va_end(args);
}

// Exit code 1
PRINTF static _Noreturn void die(const char *subject, const char *format, ...) {
    va_list args;
    va_start(args, format);
    say(subject, format, args);
    va_end(args);
    exit(EXIT_FAILURE);
}

static int imin(int a, int b) { return a < b ? a : b; }
static int imax(int a, int b) { return a > b ? a : b; }

static bool mul_overflows(size_t a, size_t b, size_t *product) {
    *product = a * b;
    return b != 0 && a > SIZE_MAX / b;
}

static size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

enum { CACHE_LINE = 64, HUGE_PAGE = 2 << 20 };

// Tells the system what to do with the whole pages of from..to.
#ifndef _WIN32
static void advise(const void *from, const void *to, int advice) {
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const uintptr_t start = round_up((uintptr_t)from, page), end = (uintptr_t)to / page * page;
    if (end > start) madvise((void *)start, end - start, advice);
}
#endif

// Memory for a * b elements, from the start of a cache line on, as a vector that lies in two takes two reads; never
// returns NULL, not even for 0 of them.
static void *allocate_unset(size_t a, size_t b, size_t element, const char *what) {
    size_t count, bytes;
    bool overflows = mul_overflows(a, b, &count) || mul_overflows(count, element, &bytes);
    void *p = NULL;
    if (!overflows && bytes < PTRDIFF_MAX - HUGE_PAGE) {
        const size_t unit = bytes < HUGE_PAGE / 2 ? CACHE_LINE : HUGE_PAGE;
        bytes = bytes ? round_up(bytes, unit) : unit;
#ifdef _WIN32
        p = malloc(bytes);  // what is aligned there cannot be freed by free
#else
        p = aligned_alloc(unit, bytes);
#endif
#ifdef MADV_HUGEPAGE
        if (p && unit == HUGE_PAGE) madvise(p, bytes, MADV_HUGEPAGE);  // fewer pages to look up
#endif
    }
    if (!p) die("", "out of memory for %s: %.0f MB", what, (double)a * (double)b * (double)element / 1e6);
    return p;
}

static void *allocate(size_t a, size_t b, size_t element, const char *what) {
    return memset(allocate_unset(a, b, element, what), 0, a * b * element);
}

static void text_append(Text *t, const void *bytes, size_t n) {
    if (n > SIZE_MAX / 4 - t->len) die("", "out of memory for text");
    if (t->len + n + 1 > t->cap) {
        size_t cap = 2 * (t->len + n + 1) + 256;
        char *data = realloc(t->data, cap);
        if (!data) die("", "out of memory for text: %zu bytes", cap);
        t->data = data;
        t->cap = cap;
    }
    if (n) memcpy(t->data + t->len, bytes, n);
    t->len += n;
    t->data[t->len] = '\0';
}

static void text_append_string(Text *t, const char *s) { text_append(t, s, strlen(s)); }

static Text read_stream(FILE *f, const char *name) {
    Text t = {0};
    char chunk[1 << 14];
    size_t n;
    text_append(&t, "", 0);
    while ((n = fread(chunk, 1, sizeof chunk, f)) > 0) text_append(&t, chunk, n);
    if (ferror(f)) die(name, "cannot read: %s", strerror(errno));
    return t;
}

// `hint` says how to make the file, for those who have not yet.
static File open_file(const char *path, const char *hint) {
    File file = {.path = path};
    struct stat st;
    FILE *f = fopen(path, "rb");
    if (!f) die(path, "cannot open: %s%s", strerror(errno), errno == ENOENT ? hint : "");
    if (fstat(fileno(f), &st) != 0) die(path, "cannot read: %s", strerror(errno));
#ifndef _WIN32
    if (S_ISDIR(st.st_mode)) die(path, "is a directory, not a file; name a file in it");
    if (S_ISCHR(st.st_mode)) die(path, "is a device, not a file");
    if (S_ISREG(st.st_mode) && st.st_size > 0 && (uintmax_t)st.st_size <= SIZE_MAX) {
        void *data = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fileno(f), 0);
        if (data == MAP_FAILED) die(path, "cannot map into memory: %s", strerror(errno));
        file = (File){path, data, (size_t)st.st_size, true};
    }
#endif
    if (!file.mapped) {  // Windows, a pipe, an empty file
        Text all = read_stream(f, path);
        file = (File){path, (unsigned char *)all.data, all.len, false};
    }
    fclose(f);
    return file;
}

static void close_file(File *file) {
#ifndef _WIN32
    if (file->mapped) munmap((void *)(uintptr_t)file->data, file->size);
#endif
    if (!file->mapped) free((void *)(uintptr_t)file->data);
}

// The text in a file, or on stdin, if the path is "-"; without a byte order mark, and with \r\n as \n.
static Text read_text(const char *path) {
    Text t = {0};
    if (!strcmp(path, "-")) {
        t = read_stream(stdin, "stdin");
    } else {
        File f = open_file(path, "; name a text file that is");
        text_append(&t, f.data, f.size);
        close_file(&f);
    }
    size_t n = 0;
    for (size_t i = t.len >= 3 && !memcmp(t.data, "\xEF\xBB\xBF", 3) ? 3 : 0; i < t.len; i++) {
        if (t.data[i] != '\r' || i + 1 == t.len || t.data[i + 1] != '\n') t.data[n++] = t.data[i];
    }
    t.len = n;
    return t;
}

static void flush_stdout(void) {
    if (!ferror(stdout) && fflush(stdout) == 0) return;
    die("stdout", "cannot write: %s", errno ? strerror(errno) : "write error");
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

// Values inside a mapped file may lie at any address; memcpy compiles to a plain load.
static int32_t i32_at(const unsigned char *p) { int32_t v; memcpy(&v, p, sizeof v); return v; }
static float f32_at(const unsigned char *p) { float v; memcpy(&v, p, sizeof v); return v; }

static float f16_at(const unsigned char *p) {  // a half float, by moving its bits to where a float has them
    uint32_t half = (uint32_t)p[0] | (uint32_t)p[1] << 8, bits = (half & 0x7FFF) << 13;
    float v;
    memcpy(&v, &bits, sizeof v);
    v *= 0x1p112f;  // the difference of the exponents' offsets
    if ((half & 0x7C00) == 0x7C00) v = NAN;  // no weight has such a scale
    return half & 0x8000 ? -v : v;
}

static uint16_t f16_of(float x) {  // the nearest half float, even at a tie, of a number up to 65504
    const float v = fabsf(x), shifted = v + 0.5f;  // whose last bit is that of the smallest half floats
    const uint16_t sign = signbit(x) ? 0x8000 : 0;
    uint32_t bits;
    if (isnan(x)) return 0x7E00;
    memcpy(&bits, v < 0x1p-14f ? &shifted : &v, sizeof bits);
    if (v < 0x1p-14f) return (uint16_t)(sign | (bits - 0x3F000000));
    return (uint16_t)(sign | (((bits + 0xFFF + (bits >> 13 & 1)) >> 13) - 0x1C000));
}

// ---------------------------------------------------------------------------------------------------------
// Threads: all of them run the same forward pass, each its share of the rows, and meet at barriers

enum { TRIAL = 4, SHORTEST_PAUSE = 16, LONGEST_PAUSE = 1024 };  // tokens, see note_time()

typedef struct {             // whether all threads or one decode a model's tokens
    bool alone;              // the way that is faster, so far
    double usual_time;       // seconds that a token takes this way,
    double trial_time;       // and took the other way in a trial
    double lost;             // seconds that a trial took more than the usual way would have
    long tokens, trial;      // decoded so far; when to try the other way
    int pause;               // tokens from one trial to the next
    double hopeless;         // a trial ends when a token but its first takes so many times as long
} Pace;

typedef struct {
    int size;                // threads, the caller's included
    int n;                   // of them that work now: all, or the caller's alone
    atomic_uint phase;       // how often all have met
    atomic_int arrived;      // at the barrier to come
    atomic_int sleepers;
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    struct Worker *workers;  // (size,) but for the first, which is the caller
    void (*work)(void *context, int thread);  // NULL: go home
    void *context;
} Pool;

typedef struct Worker {
    Pool *pool;
    int thread;
    pthread_t id;
} Worker;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

// Waits for all threads: a moment busily, as most waits are shorter than a microsecond; then asleep, for where
// another program has one of the cores, what we wait for may need ours. (sched_yield would give away our turn.)
static void barrier_wait(Pool *p) {
    enum { SPINS = 2000 };
    const unsigned phase = atomic_load(&p->phase);
    if (atomic_fetch_add(&p->arrived, 1) == p->size - 1) {
        atomic_store(&p->arrived, 0);
        atomic_store(&p->phase, phase + 1);
        if (atomic_load(&p->sleepers)) {
            pthread_mutex_lock(&p->mutex);
            pthread_cond_broadcast(&p->wake);
            pthread_mutex_unlock(&p->mutex);
        }
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&p->phase, memory_order_acquire) != phase) return;
        relax();
    }
    pthread_mutex_lock(&p->mutex);
    atomic_fetch_add(&p->sleepers, 1);
    while (atomic_load(&p->phase) == phase) pthread_cond_wait(&p->wake, &p->mutex);
    atomic_fetch_sub(&p->sleepers, 1);
    pthread_mutex_unlock(&p->mutex);
}

static void barrier(Pool *p) {
    if (p->n > 1) barrier_wait(p);
}

static void *worker(void *argument) {
    const Worker *self = argument;
    Pool *p = self->pool;
    pthread_mutex_lock(&p->mutex);  // until start_pool knows how many there are
    pthread_mutex_unlock(&p->mutex);
    for (;;) {
        barrier_wait(p);
        if (!p->work) return NULL;
        p->work(p->context, self->thread);
        barrier_wait(p);
    }
}

// Runs work(context, thread) on the threads that work now, and returns when all are done.
static void run_all(Pool *p, void (*work)(void *, int), void *context) {
    p->work = work;
    p->context = context;
    barrier(p);
    work(context, 0);
    barrier(p);
}

// n threads, or, if fewer will do, as many as can be started.
static void start_pool(Pool *p, int n, bool fewer_will_do) {
    *p = (Pool){.size = 1};
    p->workers = allocate(n, 1, sizeof(Worker), "threads");
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    pthread_mutex_lock(&p->mutex);
    int error = 0;
    for (; p->size < n; p->size++) {
        Worker *w = &p->workers[p->size];
        *w = (Worker){.pool = p, .thread = p->size};
        error = pthread_create(&w->id, NULL, worker, w);
        if (error) break;
    }
    p->n = p->size;
    pthread_mutex_unlock(&p->mutex);
    if (p->size < n && !fewer_will_do) die("-j", "cannot start thread %d: %s", p->size + 1, strerror(error));
}

static void stop_pool(Pool *p) {
    p->work = NULL;
    if (p->size > 1) barrier_wait(p);
    for (int i = 1; i < p->size; i++) pthread_join(p->workers[i].id, NULL);
    pthread_cond_destroy(&p->wake);
    pthread_mutex_destroy(&p->mutex);
    free(p->workers);
}

static Pace start_pace(bool alone) {
    return (Pace){.alone = alone, .trial = TRIAL, .pause = SHORTEST_PAUSE / 2, .hopeless = 4};
}

// A token of a small model takes one thread less time than all, which have to meet; so does any model's where other
// programs have the cores. Both ways are tried again and again, the slower one ever more seldom. The text does not
// depend on it.
static int choose_threads(const Pace *p, int threads) {
    const bool alone = p->tokens >= p->trial ? !p->alone : p->alone;
    return alone ? 1 : threads;
}

// Moving average of times, of which the first counts in full
static void average(double *mean, double x) { *mean += (x - *mean) * (*mean > 0 ? 0.125 : 1); }

// Takes note of what a token took; at the end of a trial takes the faster way, and puts off the next trial.
static void note_time(Pace *p, double seconds) {
    const long into = p->tokens++ - p->trial;
    if (into < 0) {
        average(&p->usual_time, seconds);
        return;
    }
    const bool hopeless = seconds > (into == 0 ? 4 : p->hopeless) * p->usual_time;
    if (into > 0) p->trial_time += seconds / (TRIAL - 1);  // the first token wakes the threads
    p->lost += seconds - p->usual_time;
    if (into + 1 < TRIAL && !hopeless) return;
    // trials lose a small part of the time: threads that sleep take as long to wake as many tokens of a small model
    p->pause = (int)fmin(fmax(2 * p->pause, fmin(32 * p->lost / p->usual_time, 8 * p->pause)), LONGEST_PAUSE);
    if (p->trial_time < p->usual_time && !hopeless) {
        p->alone = !p->alone;
        p->usual_time = p->trial_time;
        p->pause = SHORTEST_PAUSE;
    }
    p->trial_time = p->lost = 0;
    p->trial = p->tokens + p->pause;
}

// Thread `thread` of n gets from..to of count things; blocks of `block` stay together.
static void partition(int count, int block, int thread, int n, int *from, int *to) {
    const int64_t blocks = (count + block - 1) / block;
    *from = imin((int)(blocks * thread / n * block), count);
    *to = imin((int)(blocks * (thread + 1) / n * block), count);
}

// A container's limit: the first number of a file, as a share of the second, if there is one. Infinite without.
static double container_limit(const char *path) {
    double limit, period = 1;
    FILE *f = fopen(path, "r");
    const int found = f ? fscanf(f, "%lf %lf", &limit, &period) : 0;
    if (f) fclose(f);
    return found > 0 && limit > 0 && period > 0 ? limit / period : HUGE_VAL;
}

// Cores that this process may use; hardware threads of one core count once.
static int physical_cores(void) {
#if defined(__linux__)
    cpu_set_t allowed, seen;
    CPU_ZERO(&seen);
    int cores = 0;
    if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        char path[96];
        int first = cpu;
        if (!CPU_ISSET(cpu, &allowed)) continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        FILE *f = fopen(path, "r");
        if (f && fscanf(f, "%d", &first) != 1) first = cpu;
        if (f) fclose(f);
        if (first < 0 || first >= CPU_SETSIZE) first = cpu;
        if (!CPU_ISSET(first, &seen)) cores++;
        CPU_SET(first, &seen);
    }
    const double limit = container_limit(CONTAINER "cpu.max");  // a part of a core is no core: all wait for it
    return cores <= 1 || limit < 2 ? 1 : cores < limit ? cores : (int)limit;
#elif defined(__APPLE__)
    int cores = 1;
    size_t size = sizeof cores;
    return sysctlbyname("hw.physicalcpu", &cores, &size, NULL, 0) == 0 && cores > 0 ? cores : 1;
#elif defined(_WIN32)
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return info.dwNumberOfProcessors > 1 ? (int)info.dwNumberOfProcessors / 2 : 1;
#else
    return 1;
#endif
}

// ---------------------------------------------------------------------------------------------------------
// Instruction sets. The kernels are written once, for vectors of 16 floats and of 64 int8; each set below says
// what those are and does the dozen things the kernels need. All sets sum in the same order, lane by lane, so
// they differ only where one rounds a*b+c once and another twice. What runs is chosen when the program starts.

#define CONCAT_(a, b) a##_##b
#define CONCAT(a, b) CONCAT_(a, b)
#define V(name) CONCAT(name, ISA)  // V(load) is load_avx2, when ISA is avx2
#define PREFETCH(p) __builtin_prefetch(p)
#define PREFETCH_L2(p) __builtin_prefetch(p, 0, 2)  // where the first cache has no room
#define NOINLINE __attribute__((noinline))
#ifdef SMALL  // compiles in a tenth of the time, runs slowly: for debugging
    #define INLINE static inline
    #define UNROLL
#else
    #define INLINE static inline __attribute__((always_inline))
    #define UNROLL _Pragma("GCC unroll 16")
#endif

#define LOWER_HALF 0x1.fffffep-2f  // the float before 0.5: adding it and truncating rounds half away from zero

// Plain C: the compiler makes of it what the machine's baseline has.
#define TARGET_plain
typedef struct { float v[LANES]; } F_plain;
typedef struct { int32_t v[LANES]; } I_plain;
typedef struct { int8_t v[BAND]; } Q_plain;
#define WEIGHT_XOR_plain 0
#define keep_plain(x) ((void)(x))
#define EACH for (int j = 0; j < LANES; j++)
INLINE F_plain set1_plain(float x) { F_plain r; EACH r.v[j] = x; return r; }
INLINE F_plain load_plain(const float *p) { F_plain r; memcpy(&r, p, sizeof r); return r; }
INLINE F_plain load_n_plain(const float *p, int n) {
    F_plain r = {{0}};
    for (int j = 0; j < n; j++) r.v[j] = p[j];
    return r;
}
INLINE void store_plain(float *p, F_plain a) { memcpy(p, &a, sizeof a); }
INLINE void store_n_plain(float *p, F_plain a, int n) { for (int j = 0; j < n; j++) p[j] = a.v[j]; }
INLINE F_plain add_plain(F_plain a, F_plain b) { EACH a.v[j] += b.v[j]; return a; }
INLINE F_plain sub_plain(F_plain a, F_plain b) { EACH a.v[j] -= b.v[j]; return a; }
INLINE F_plain mul_plain(F_plain a, F_plain b) { EACH a.v[j] *= b.v[j]; return a; }
INLINE F_plain div_plain(F_plain a, F_plain b) { EACH a.v[j] /= b.v[j]; return a; }
INLINE F_plain max_plain(F_plain a, F_plain b) { EACH a.v[j] = a.v[j] > b.v[j] ? a.v[j] : b.v[j]; return a; }
INLINE F_plain fma_plain(F_plain a, F_plain b, F_plain c) { EACH c.v[j] += a.v[j] * b.v[j]; return c; }
INLINE F_plain trunc_plain(F_plain a) {  // damaged weights bring NaNs here, which no int can hold
    EACH a.v[j] = fabsf(a.v[j]) < 0x1p31f ? (float)(int)a.v[j] : 0.0f;
    return a;
}
INLINE F_plain abs_plain(F_plain a) { EACH a.v[j] = fabsf(a.v[j]); return a; }
INLINE F_plain sign_plain(F_plain a, F_plain of) { EACH a.v[j] = copysignf(a.v[j], of.v[j]); return a; }
INLINE F_plain pow2_plain(F_plain n) {  // of whole numbers from -126 to 127
    EACH { uint32_t bits = (uint32_t)((int)n.v[j] + 127) << 23; memcpy(&n.v[j], &bits, 4); }
    return n;
}
INLINE float sum_plain(F_plain a) {
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; j++) a.v[j] += a.v[j + width];
    }
    return a.v[0];
}
INLINE void sum4_plain(float out[4], F_plain a, F_plain b, F_plain c, F_plain d) {
    out[0] = sum_plain(a); out[1] = sum_plain(b); out[2] = sum_plain(c); out[3] = sum_plain(d);
}
INLINE float reduce_max_plain(F_plain a) { EACH if (a.v[j] > a.v[0]) a.v[0] = a.v[j]; return a.v[0]; }
INLINE void store_int8_plain(int8_t *p, F_plain a) { EACH p[j] = (int8_t)(int)a.v[j]; }
INLINE Q_plain bytes_plain(const void *p) { Q_plain r; memcpy(&r, p, sizeof r); return r; }
INLINE Q_plain low_plain(Q_plain a) { for (int j = 0; j < BAND; j++) a.v[j] &= 15; return a; }
INLINE Q_plain high_plain(Q_plain a) { for (int j = 0; j < BAND; j++) a.v[j] = (uint8_t)a.v[j] >> 4; return a; }
INLINE I_plain seti_plain(int32_t x) { I_plain r; EACH r.v[j] = x; return r; }
INLINE I_plain addi_plain(I_plain a, I_plain b) { EACH a.v[j] += b.v[j]; return a; }
INLINE I_plain dot8_plain(I_plain sum, Q_plain w, const int8_t *x) {
    EACH for (int k = 0; k < 4; k++) sum.v[j] += w.v[4 * j + k] * x[k];
    return sum;
}
#define dot4_plain dot8_plain
#define total4_plain(sum) (sum)
INLINE F_plain float_plain(I_plain a) { F_plain r; EACH r.v[j] = (float)a.v[j]; return r; }
INLINE F_plain halves_plain(const unsigned char *p) { F_plain r; EACH r.v[j] = f16_at(p + 2 * j); return r; }
INLINE void store_halves_plain(uint16_t *p, F_plain a) { EACH p[j] = f16_of(a.v[j]); }

#if defined(__x86_64__)
#include <immintrin.h>

// AVX2 with FMA and half floats: Intel since 2013, AMD since 2015
#define TARGET_avx2 __attribute__((target("avx2,fma,f16c")))
#define AVX2 INLINE TARGET_avx2
typedef struct { __m256 a, b; } F_avx2;
typedef struct { __m256i a, b; } I_avx2, Q_avx2;
#define WEIGHT_XOR_avx2 0
// Keeps x in registers: compilers would rather load weights again for each product, and keep sums in memory.
#define keep_avx2(x) __asm__("" : "+x"((x)->a), "+x"((x)->b))
AVX2 F_avx2 set1_avx2(float x) { return (F_avx2){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
AVX2 F_avx2 load_avx2(const float *p) { return (F_avx2){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
AVX2 __m256i first_avx2(int n) {  // the first n of 8 lanes
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
AVX2 F_avx2 load_n_avx2(const float *p, int n) {
    return (F_avx2){_mm256_maskload_ps(p, first_avx2(n)),
                    n > 8 ? _mm256_maskload_ps(p + 8, first_avx2(n - 8)) : _mm256_setzero_ps()};
}
AVX2 void store_avx2(float *p, F_avx2 x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
AVX2 void store_n_avx2(float *p, F_avx2 x, int n) {
    _mm256_maskstore_ps(p, first_avx2(n), x.a);
    if (n > 8) _mm256_maskstore_ps(p + 8, first_avx2(n - 8), x.b);
}
#define BOTH(f, ...) AVX2 F_avx2 f { return (F_avx2){__VA_ARGS__}; }
BOTH(add_avx2(F_avx2 x, F_avx2 y), _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b))
BOTH(sub_avx2(F_avx2 x, F_avx2 y), _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b))
BOTH(mul_avx2(F_avx2 x, F_avx2 y), _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b))
BOTH(div_avx2(F_avx2 x, F_avx2 y), _mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b))
BOTH(max_avx2(F_avx2 x, F_avx2 y), _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b))
BOTH(fma_avx2(F_avx2 x, F_avx2 y, F_avx2 z), _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b))
BOTH(trunc_avx2(F_avx2 x), _mm256_round_ps(x.a, 11), _mm256_round_ps(x.b, 11))
BOTH(abs_avx2(F_avx2 x), _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.a),
     _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.b))
BOTH(sign_avx2(F_avx2 x, F_avx2 of), _mm256_or_ps(x.a, _mm256_and_ps(_mm256_set1_ps(-0.0f), of.a)),
     _mm256_or_ps(x.b, _mm256_and_ps(_mm256_set1_ps(-0.0f), of.b)))
AVX2 __m256 pow2_8_avx2(__m256 n) {
    __m256i biased = _mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
BOTH(pow2_avx2(F_avx2 n), pow2_8_avx2(n.a), pow2_8_avx2(n.b))
AVX2 __m128 quarter_avx2(F_avx2 x) {  // the first two rounds of a sum
    __m256 half = _mm256_add_ps(x.a, x.b);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
AVX2 float sum_avx2(F_avx2 x) {
    __m128 q = quarter_avx2(x), two = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
AVX2 void sum4_avx2(float out[4], F_avx2 a, F_avx2 b, F_avx2 c, F_avx2 d) {
    __m128 p = quarter_avx2(a), q = quarter_avx2(b), r = quarter_avx2(c), s = quarter_avx2(d);
    _MM_TRANSPOSE4_PS(p, q, r, s);
    _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(p, r), _mm_add_ps(q, s)));
}
AVX2 float reduce_max_avx2(F_avx2 x) {
    __m256 half = _mm256_max_ps(x.a, x.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
AVX2 void store_int8_avx2(int8_t *p, F_avx2 x) {
    __m256i words = _mm256_packs_epi32(_mm256_cvttps_epi32(x.a), _mm256_cvttps_epi32(x.b));
    words = _mm256_permute4x64_epi64(words, 0xD8);  // packing goes by halves
    __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)(void *)p, bytes);
}
AVX2 __m256i load_bytes_avx2(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
AVX2 Q_avx2 bytes_avx2(const unsigned char *p) { return (Q_avx2){load_bytes_avx2(p), load_bytes_avx2(p + 32)}; }
#define BOTHI(f, ...) AVX2 I_avx2 f { return (I_avx2){__VA_ARGS__}; }
BOTHI(low_avx2(Q_avx2 x), _mm256_and_si256(x.a, _mm256_set1_epi8(15)),
      _mm256_and_si256(x.b, _mm256_set1_epi8(15)))
BOTHI(high_avx2(Q_avx2 x), _mm256_and_si256(_mm256_srli_epi16(x.a, 4), _mm256_set1_epi8(15)),
      _mm256_and_si256(_mm256_srli_epi16(x.b, 4), _mm256_set1_epi8(15)))
BOTHI(seti_avx2(int32_t x), _mm256_set1_epi32(x), _mm256_set1_epi32(x))
BOTHI(addi_avx2(I_avx2 x, I_avx2 y), _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b))
// unsigned times signed, neighbours added: two products of at most 127 (x) and 128 (w) fit in an int16
AVX2 __m256i pairs_avx2(__m256i u, __m256i s) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1));
}
AVX2 I_avx2 dot8_avx2(I_avx2 sum, Q_avx2 w, const int8_t *p) {
    // x takes the sign of w, not w that of x: a file may hold -128, and there is no int8 128
    __m256i x = _mm256_set1_epi32(i32_at((const unsigned char *)p));
    sum.a = _mm256_add_epi32(sum.a, pairs_avx2(_mm256_abs_epi8(w.a), _mm256_sign_epi8(x, w.a)));
    sum.b = _mm256_add_epi32(sum.b, pairs_avx2(_mm256_abs_epi8(w.b), _mm256_sign_epi8(x, w.b)));
    keep_avx2(&sum);
    return sum;
}
// Of 4-bit weights, all 8 sums of two products that a group adds up, at most 15 * 127 each, fit in an int16.
AVX2 I_avx2 dot4_avx2(I_avx2 sum, Q_avx2 w, const int8_t *p) {
    __m256i x = _mm256_set1_epi32(i32_at((const unsigned char *)p));
    sum.a = _mm256_add_epi16(sum.a, _mm256_maddubs_epi16(w.a, x));
    sum.b = _mm256_add_epi16(sum.b, _mm256_maddubs_epi16(w.b, x));
    keep_avx2(&sum);
    return sum;
}
BOTHI(total4_avx2(I_avx2 x), _mm256_madd_epi16(x.a, _mm256_set1_epi16(1)),
      _mm256_madd_epi16(x.b, _mm256_set1_epi16(1)))
BOTH(float_avx2(I_avx2 x), _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b))
AVX2 F_avx2 halves_avx2(const unsigned char *p) {
    const __m128i *both = (const __m128i *)(const void *)p;
    return (F_avx2){_mm256_cvtph_ps(_mm_loadu_si128(both)), _mm256_cvtph_ps(_mm_loadu_si128(both + 1))};
}
AVX2 void store_halves_avx2(uint16_t *p, F_avx2 x) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128((__m128i *)(void *)p + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}

// AVX-512 with VNNI: Intel servers since 2019, AMD since 2022
#define TARGET_avx512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define AVX512 INLINE TARGET_avx512
typedef __m512 F_avx512;
typedef __m512i I_avx512, Q_avx512;
#define WEIGHT_XOR_avx512 128  // weights plus 128, as the instruction takes unsigned times signed
#define keep_avx512(x) ((void)(x))
AVX512 __m512 set1_avx512(float x) { return _mm512_set1_ps(x); }
AVX512 __m512 load_avx512(const float *p) { return _mm512_loadu_ps(p); }
AVX512 __mmask16 first_avx512(int n) { return (__mmask16)((1u << n) - 1); }
AVX512 __m512 load_n_avx512(const float *p, int n) { return _mm512_maskz_loadu_ps(first_avx512(n), p); }
AVX512 void store_avx512(float *p, __m512 a) { _mm512_storeu_ps(p, a); }
AVX512 void store_n_avx512(float *p, __m512 a, int n) { _mm512_mask_storeu_ps(p, first_avx512(n), a); }
AVX512 __m512 add_avx512(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
AVX512 __m512 sub_avx512(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
AVX512 __m512 mul_avx512(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
AVX512 __m512 div_avx512(__m512 a, __m512 b) { return _mm512_div_ps(a, b); }
AVX512 __m512 max_avx512(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
AVX512 __m512 fma_avx512(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
AVX512 __m512 trunc_avx512(__m512 a) { return _mm512_roundscale_ps(a, 11); }
AVX512 __m512 abs_avx512(__m512 a) { return _mm512_abs_ps(a); }
AVX512 __m512 sign_avx512(__m512 a, __m512 of) {
    return _mm512_or_ps(a, _mm512_and_ps(_mm512_set1_ps(-0.0f), of));
}
AVX512 __m512 pow2_avx512(__m512 n) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n); }
AVX512 __m128 quarter_avx512(__m512 x) {
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
AVX512 float sum_avx512(__m512 x) {
    __m128 q = quarter_avx512(x), two = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
AVX512 void sum4_avx512(float out[4], __m512 a, __m512 b, __m512 c, __m512 d) {
    // rounds one and two of all four sums at once: quarters of a and b beside each other, then of all
    __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4E));  // lanes 0 and 2, 1 and 3
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xB1));
    __m512i every4 = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(every4, all)));
}
AVX512 float reduce_max_avx512(__m512 a) { return _mm512_reduce_max_ps(a); }
AVX512 void store_int8_avx512(int8_t *p, __m512 a) {
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(a)));
}
AVX512 __m512i bytes_avx512(const unsigned char *p) { return _mm512_loadu_si512(p); }
AVX512 __m512i low_avx512(__m512i a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
AVX512 __m512i high_avx512(__m512i a) { return low_avx512(_mm512_srli_epi16(a, 4)); }
AVX512 __m512i seti_avx512(int32_t x) { return _mm512_set1_epi32(x); }
AVX512 __m512i addi_avx512(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
AVX512 __m512i dot8_avx512(__m512i sum, __m512i w, const int8_t *p) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(i32_at((const unsigned char *)p)));
}
#define dot4_avx512 dot8_avx512
#define total4_avx512(sum) (sum)
AVX512 __m512 float_avx512(__m512i a) { return _mm512_cvtepi32_ps(a); }
AVX512 __m512 halves_avx512(const unsigned char *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
AVX512 void store_halves_avx512(uint16_t *p, __m512 x) {
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
#endif  // x86-64

#if defined(__aarch64__)
#include <arm_neon.h>

#define TARGET_neon
typedef struct { float32x4_t v[4]; } F_neon;
typedef struct { int32x4_t v[4]; } I_neon;
typedef struct { int8x16_t v[4]; } Q_neon;
#define WEIGHT_XOR_neon 0
#define keep_neon(x) ((void)(x))
#define FOUR UNROLL for (int j = 0; j < 4; j++)
#define NEON INLINE F_neon
NEON set1_neon(float x) { F_neon r; FOUR r.v[j] = vdupq_n_f32(x); return r; }
NEON load_neon(const float *p) { F_neon r; FOUR r.v[j] = vld1q_f32(p + 4 * j); return r; }
NEON load_n_neon(const float *p, int n) {
    float all[LANES] = {0};
    memcpy(all, p, (size_t)n * sizeof *p);
    return load_neon(all);
}
INLINE void store_neon(float *p, F_neon a) { FOUR vst1q_f32(p + 4 * j, a.v[j]); }
INLINE void store_n_neon(float *p, F_neon a, int n) {
    float all[LANES];
    store_neon(all, a);
    memcpy(p, all, (size_t)n * sizeof *p);
}
NEON add_neon(F_neon a, F_neon b) { FOUR a.v[j] = vaddq_f32(a.v[j], b.v[j]); return a; }
NEON sub_neon(F_neon a, F_neon b) { FOUR a.v[j] = vsubq_f32(a.v[j], b.v[j]); return a; }
NEON mul_neon(F_neon a, F_neon b) { FOUR a.v[j] = vmulq_f32(a.v[j], b.v[j]); return a; }
NEON div_neon(F_neon a, F_neon b) { FOUR a.v[j] = vdivq_f32(a.v[j], b.v[j]); return a; }
NEON max_neon(F_neon a, F_neon b) { FOUR a.v[j] = vmaxq_f32(a.v[j], b.v[j]); return a; }
NEON fma_neon(F_neon a, F_neon b, F_neon c) { FOUR c.v[j] = vfmaq_f32(c.v[j], a.v[j], b.v[j]); return c; }
NEON trunc_neon(F_neon a) { FOUR a.v[j] = vrndq_f32(a.v[j]); return a; }
NEON abs_neon(F_neon a) { FOUR a.v[j] = vabsq_f32(a.v[j]); return a; }
NEON sign_neon(F_neon a, F_neon of) {
    FOUR a.v[j] = vbslq_f32(vdupq_n_u32(0x80000000u), of.v[j], a.v[j]);
    return a;
}
NEON pow2_neon(F_neon n) {
    FOUR n.v[j] = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[j]), vdupq_n_s32(127)), 23));
    return n;
}
INLINE float32x4_t quarter_neon(F_neon a) {
    return vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
}
INLINE float sum_neon(F_neon a) {
    float32x4_t q = quarter_neon(a);
    float32x2_t two = vadd_f32(vget_low_f32(q), vget_high_f32(q));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE void sum4_neon(float out[4], F_neon a, F_neon b, F_neon c, F_neon d) {
    out[0] = sum_neon(a); out[1] = sum_neon(b); out[2] = sum_neon(c); out[3] = sum_neon(d);
}
INLINE float reduce_max_neon(F_neon a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}
INLINE void store_int8_neon(int8_t *p, F_neon a) {
    int16x8_t low = vcombine_s16(vmovn_s32(vcvtq_s32_f32(a.v[0])), vmovn_s32(vcvtq_s32_f32(a.v[1])));
    int16x8_t high = vcombine_s16(vmovn_s32(vcvtq_s32_f32(a.v[2])), vmovn_s32(vcvtq_s32_f32(a.v[3])));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
INLINE Q_neon bytes_neon(const unsigned char *p) {
    Q_neon r;
    FOUR r.v[j] = vreinterpretq_s8_u8(vld1q_u8(p + 16 * j));
    return r;
}
INLINE Q_neon low_neon(Q_neon a) { FOUR a.v[j] = vandq_s8(a.v[j], vdupq_n_s8(15)); return a; }
INLINE Q_neon high_neon(Q_neon a) {
    FOUR a.v[j] = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(a.v[j]), 4));
    return a;
}
INLINE I_neon seti_neon(int32_t x) { I_neon r; FOUR r.v[j] = vdupq_n_s32(x); return r; }
INLINE I_neon addi_neon(I_neon a, I_neon b) { FOUR a.v[j] = vaddq_s32(a.v[j], b.v[j]); return a; }
INLINE I_neon dot8_neon(I_neon sum, Q_neon w, const int8_t *p) {
    int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(i32_at((const unsigned char *)p)));
    FOUR {
#ifdef __ARM_FEATURE_DOTPROD
        sum.v[j] = vdotq_s32(sum.v[j], w.v[j], x);
#else
        int16x8_t low = vmull_s8(vget_low_s8(w.v[j]), vget_low_s8(x));
        int16x8_t high = vmull_s8(vget_high_s8(w.v[j]), vget_high_s8(x));
        sum.v[j] = vaddq_s32(sum.v[j], vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
    }
    return sum;
}
#define dot4_neon dot8_neon
#define total4_neon(sum) (sum)
NEON float_neon(I_neon a) { F_neon r; FOUR r.v[j] = vcvtq_f32_s32(a.v[j]); return r; }
NEON halves_neon(const unsigned char *p) {
    F_neon r;
    FOUR r.v[j] = vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * j)));
    return r;
}
INLINE void store_halves_neon(uint16_t *p, F_neon x) {
    FOUR vst1_u16(p + 4 * j, vreinterpret_u16_f16(vcvt_f16_f32(x.v[j])));
}
#endif  // aarch64

// ---------------------------------------------------------------------------------------------------------
// The kernels of all instruction sets

#define ISA plain
#define TILE 1       // rows of x that a band is multiplied with at once (of fp32 up to six, see six_rows)
#define TILE_TWO 1   // rows of x that two bands are multiplied with at once
#define TILE_F32 1   // rows of x that four rows of fp32 weights are multiplied with at once
#include "run.c"
#if defined(__x86_64__)
    #define ISA avx2
    #define TILE 4
    #define TILE_TWO 2
    #define TILE_F32 1
    #include "run.c"
    #define ISA avx512
    #define TILE 8
    #define TILE_TWO 8
    #define TILE_F32 4
    #include "run.c"
#elif defined(__aarch64__)
    #define ISA neon
    #define TILE 2
    #define TILE_TWO 2
    #define TILE_F32 1
    #include "run.c"
#endif

static const Kernels *const all_kernels[] = {  // the fastest first
#if defined(__x86_64__)
    &kernels_avx512, &kernels_avx2,
#elif defined(__aarch64__)
    &kernels_neon,
#endif
    &kernels_plain,
};
enum { N_KERNELS = sizeof all_kernels / sizeof *all_kernels };

static bool usable(const Kernels *k) {
#if defined(__x86_64__)
    // whatever has AVX2 has half floats, for which not every compiler can ask
    if (k == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (k == &kernels_avx512) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512vnni");
    }
#endif
    (void)k;
    return true;
}

static const Kernels *best_kernels(void) {
    size_t i = 0;
    while (!usable(all_kernels[i])) i++;
    return all_kernels[i];
}

static const Kernels *find_kernels(const char *name) {
    for (size_t i = 0; i < N_KERNELS; i++) {
        if (!strcmp(name, all_kernels[i]->name) && usable(all_kernels[i])) return all_kernels[i];
    }
    die("--kernels", "there are none named '%s' here; run --version lists them", name);
}

typedef struct {
    File file;  // the weights point into it
    Config config;
    Weights weights;
    RunState state;
    const Kernels *kernels;
    Pool *pool;
    Pace pace;           // of one token
    Pace many_pace;      // of a token each of many stories; time is that of one of them
    void *packed;        // the weights as matmul reads them, where the file has them otherwise
    const Row *rows;     // what feed() was given: n_rows of them,
    int n_rows;
    int first_logits;    // with logits wanted from this one on
} Model;

// ---------------------------------------------------------------------------------------------------------
// Loading: header, then one walk over the tensors that finds every pointer and the file's exact size

enum { MODEL_MAGIC = 0x616b3432, V0_HEADER = 28, V1_HEADER = 256 };
enum { MAX_WIDTH = 1 << 24, MAX_LAYERS = 1 << 14 };
enum { MAX_GROUP = 1 << 16 };  // the sum of this many int8 products fits in int32

typedef struct {
    const File *file;
    size_t at;  // bytes walked over; goes on past a truncated file's end, to know the size it should have
} Walk;

// The next a * b elements, or NULL when the file ends before them.
static const unsigned char *take(Walk *w, size_t a, size_t b, size_t element) {
    size_t start = w->at, count, bytes;
    if (mul_overflows(a, b, &count) || mul_overflows(count, element, &bytes) || bytes > SIZE_MAX - start) {
        die(w->file->path, "the header describes a model larger than memory can address");
    }
    w->at = start + bytes;
    return w->at <= w->file->size ? w->file->data + start : NULL;
}

static const float *take_floats(Walk *w, int n) {
    // aligned: mmap and malloc are, headers are multiples of 4, and in v2 these come before the int8 data
    return (const float *)(const void *)take(w, 1, n, sizeof(float));
}

static Tensor take_tensor(Walk *w, const Config *c, int rows, int cols) {
    Tensor t = {.rows = rows, .cols = cols, .bits = c->bits, .group = c->group_size};
    if (t.bits == 32) {
        t.f = (const float *)(const void *)take(w, rows, cols, sizeof(float));
        return t;
    }
    t.groups = ((size_t)cols + (size_t)t.group - 1) / (size_t)t.group;
    t.units = ((size_t)t.group + 3) / 4;
    if (t.bits == 8) {
        t.q = take(w, rows, cols, 1);
        t.scale = take(w, rows, t.groups, sizeof(float));
    } else {
        const size_t bands = round_up((size_t)rows, LANES) / LANES;
        take(w, round_up(w->at, BAND) - w->at, 1, 1);
        t.values = take(w, bands, t.groups * GROUP4 / 2, LANES);
        t.scales = take(w, bands, t.groups * LANES, 2);
    }
    return t;
}

#define EACH_LAYER(field, value) for (int l = 0; l < c->n_layers; l++) (w->layers[l].field = (value))

static void walk_weights(Walk *f, const Config *c, int version, Weights *w) {
    const bool v0 = version == 0;  // the later layouts begin with all that stays fp32
    if (v0) w->tok_embeddings = take_tensor(f, c, c->vocab_size, c->dim);
    EACH_LAYER(rms_att, take_floats(f, c->dim));
    if (!v0) {
        EACH_LAYER(rms_ffn, take_floats(f, c->dim));
        w->rms_final = take_floats(f, c->dim);
        w->tok_embeddings = take_tensor(f, c, c->vocab_size, c->dim);
    }
    EACH_LAYER(wq, take_tensor(f, c, c->dim, c->dim));
    EACH_LAYER(wk, take_tensor(f, c, c->kv_dim, c->dim));
    EACH_LAYER(wv, take_tensor(f, c, c->kv_dim, c->dim));
    EACH_LAYER(wo, take_tensor(f, c, c->dim, c->dim));
    if (v0) EACH_LAYER(rms_ffn, take_floats(f, c->dim));
    EACH_LAYER(w1, take_tensor(f, c, c->hidden_dim, c->dim));
    EACH_LAYER(w2, take_tensor(f, c, c->dim, c->hidden_dim));
    EACH_LAYER(w3, take_tensor(f, c, c->hidden_dim, c->dim));
    if (v0) w->rms_final = take_floats(f, c->dim);
    if (v0) take(f, c->seq_len, c->head_size, sizeof(float));  // RoPE tables; we compute our own
    w->wcls = c->shared_classifier ? w->tok_embeddings : take_tensor(f, c, c->vocab_size, c->dim);
}

#define REMAKE "; make it again: python export.py model.bin"

// Files that people hand over by mistake: say what they are.
static void refuse_other_formats(const File *file) {
    const char *path = file->path;
    const unsigned char *d = file->data;
    size_t n = file->size < 64 ? file->size : 64;
    bool text = true;
    if (n == 0) die(path, "the file is empty" REMAKE);
    if (n >= 4 && (!memcmp(d, "PK\3\4", 4) || (d[0] == 0x80 && d[1] >= 2 && d[1] <= 5 && d[2] && d[3]))) {
        die(path, "this is a PyTorch checkpoint; convert it: "
            "python export.py model.bin --checkpoint %s", path);
    }
    const char *other = n >= 4 && !memcmp(d, "GGUF", 4) ? "GGUF"
                      : n >= 10 && !d[7] && !memcmp(d + 8, "{\"", 2) ? "safetensors" : NULL;
    if (other) die(path, "this is a %s file; run needs a model.bin, as made by: python export.py", other);
    if (n >= 17 && (!memcmp(d + 12, "<unk>", 5) || !memcmp(d + 4, "<unk>", 5))) {  // ours, and sentencepiece's
        die(path, "this is a tokenizer, not a model; usage: run MODEL.bin -z TOKENIZER.bin");
    }
    for (size_t i = 0; i < n; i++) {
        if (d[i] < '\t' || (d[i] > '\r' && d[i] < ' ') || d[i] >= 0xF8) text = false;
    }
    // a v0 header always holds zero bytes
    if (text) die(path, "this is a text file, not a model; usage: run MODEL.bin -z TOKENIZER.bin");
}

static void check_config(const char *path, const Config *c) {
    const struct { const char *name; int value, min, max; } ranges[] = {
        {"dim", c->dim, 2, MAX_WIDTH},
        {"hidden_dim", c->hidden_dim, 1, MAX_WIDTH},
        {"n_layers", c->n_layers, 1, MAX_LAYERS},
        {"n_heads", c->n_heads, 1, MAX_WIDTH},
        {"n_kv_heads", c->n_kv_heads, 1, MAX_WIDTH},
        {"vocab_size", c->vocab_size, 3, MAX_WIDTH},  // <unk>, <s>, </s>
        {"seq_len", c->seq_len, 1, MAX_WIDTH},
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++) {
        if (ranges[i].value < ranges[i].min || ranges[i].value > ranges[i].max) {
            die(path, "not a model, or damaged: %s in the header is %d (expected %d to %d)" REMAKE,
                ranges[i].name, ranges[i].value, ranges[i].min, ranges[i].max);
        }
    }
    if (c->dim % c->n_heads) die(path, "damaged header: %d heads do not divide dim %d", c->n_heads, c->dim);
    if (c->dim / c->n_heads % 2) die(path, "damaged header: odd head size %d", c->dim / c->n_heads);
    if (c->n_heads % c->n_kv_heads) {
        die(path, "damaged header: %d key/value heads do not divide %d heads", c->n_kv_heads, c->n_heads);
    }
    const double theta = c->rope_theta, eps = c->norm_eps;
    if (!(theta > 0 && theta <= FLT_MAX)) die(path, "damaged header: rope_theta %g", theta);
    if (!(eps > 0 && eps < 1)) die(path, "damaged header: norm_eps %g", eps);
}

// Reads the version and the config; returns the version.
static int read_header(Walk *f, Config *c) {
    const char *path = f->file->path;
    const unsigned char *d = f->file->data;
    int version = 0;
    const unsigned char *ints = d;
    refuse_other_formats(f->file);
    if (f->file->size < V0_HEADER) die(path, "truncated: %zu bytes are no model", f->file->size);
    if (i32_at(d) == MODEL_MAGIC) {
        version = i32_at(d + 4);
        if (version < 1 || version > 3) die(path, "model version %d; run knows 0 to 3", version);
        if (f->file->size < V1_HEADER) die(path, "truncated: the file ends inside its header");
        ints = d + 8;
    }
    int vocab_size = i32_at(ints + 20);
    *c = (Config){
        .dim = i32_at(ints), .hidden_dim = i32_at(ints + 4), .n_layers = i32_at(ints + 8),
        .n_heads = i32_at(ints + 12), .n_kv_heads = i32_at(ints + 16), .vocab_size = vocab_size,
        .seq_len = i32_at(ints + 24), .shared_classifier = true, .bits = 32,
        .rope_theta = 10000.0f, .norm_eps = 1e-5f,
    };
    if (version == 0) {
        f->at = V0_HEADER;
        c->shared_classifier = vocab_size > 0;  // v0's only way to say "untied" is a negative size
        if (vocab_size < 0 && vocab_size != INT_MIN) c->vocab_size = -vocab_size;
    } else {
        f->at = V1_HEADER;
        if (d[36] > 1) die(path, "damaged header: the shared-classifier byte is %d", d[36]);
        c->shared_classifier = d[36] == 1;
        if (f32_at(d + 48) != 0) c->rope_theta = f32_at(d + 48);  // bytes that llama2.c leaves zero
        if (f32_at(d + 52) != 0) c->norm_eps = f32_at(d + 52);
    }
    check_config(path, c);
    c->head_size = c->dim / c->n_heads;
    c->kv_dim = c->n_kv_heads * c->head_size;
    if (version >= 2) {
        const int group = c->group_size = i32_at(d + 37);
        c->bits = version == 2 ? 8 : 4;
        if (version == 2 && (group < 1 || group > MAX_GROUP || c->dim % group || c->hidden_dim % group)) {
            die(path, "int8 group size %d does not divide dim %d and hidden_dim %d; export it again",
                group, c->dim, c->hidden_dim);
        }
        if (version == 3 && group != GROUP4) die(path, "damaged header: 4-bit groups of %d, not 32", group);
    }
    c->kv_bytes = c->bits == 32 ? sizeof(float) : sizeof(uint16_t);
    return version;
}

enum { MAX_ROWS = 512, LOGIT_ROWS = 64 };  // tokens that are fed at once, of a prompt or of as many texts; when
                                           // each one's logits are wanted

static float *floats(size_t a, size_t b) { return allocate(a, b, sizeof(float), "the model's state"); }

// Room for rows of n values, each so many groups of int8, with room to fill up the last one of a row.
static Activation activation(const Config *c, int rows, int n) {
    const size_t group = (size_t)c->group_size;
    Activation a = {.width = round_up((size_t)n, LANES)};
    a.f = floats(rows, a.width);
    if (!group) return a;
    a.groups = ((size_t)n + group - 1) / group;
    a.units = (group + 3) / 4;
    a.q = allocate((size_t)rows * a.groups, a.units, 4, "the model's state");
    a.scale = floats(rows, a.groups);
    a.bias = allocate(rows, a.groups, sizeof(int32_t), "the model's state");
    return a;
}

static void free_activation(Activation *a) {
    free(a->f);
    free(a->q);
    free(a->scale);
    free(a->bias);
}

static void free_state(RunState *s, int threads) {
    void *buffers[] = {s->x, s->add, s->hb2, s->q, s->k, s->v, s->scores, s->scratch, s->logits, s->rope};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    free_activation(&s->xb);
    free_activation(&s->hb);
    for (int t = 0; s->own && t < threads; t++) free_activation(&s->own[t]);
    free(s->own);
    *s = (RunState){0};
}

// Room for so many tokens at once, of which so many have logits, and for texts of so many positions.
static void reserve_state(Model *m, int rows, int logit_rows, size_t positions) {
    const Config *c = &m->config;
    RunState *s = &m->state;
    const int threads = m->pool->size, widest = imax(c->dim, c->hidden_dim);
    if (rows <= s->rows && logit_rows <= s->logit_rows && positions <= s->room) return;
    rows = imax(rows, s->rows);
    logit_rows = imax(logit_rows, s->logit_rows);
    if (positions < s->room) positions = s->room;
    free_state(s, threads);
    *s = (RunState){.rows = rows, .logit_rows = logit_rows, .room = positions,
                    .vocab_width = round_up((size_t)c->vocab_size, LANES), .scratch_size = 2 * LANES * (size_t)widest};
    s->x = floats(rows, c->dim);
    s->xb = activation(c, rows, c->dim);
    s->hb = activation(c, rows, c->hidden_dim);
    s->own = allocate(threads, 1, sizeof *s->own, "the model's state");
    for (int t = 0; t < threads; t++) s->own[t] = activation(c, 1, widest);
    if (rows > 1 && c->bits == 32 && !m->packed) s->scratch = floats(threads, s->scratch_size);
    s->add = floats(rows, c->dim);
    s->hb2 = floats(rows, c->hidden_dim);
    s->q = floats(rows, c->dim);
    s->k = floats(rows, c->kv_dim);
    s->v = floats(rows, c->kv_dim);
    s->logits = floats(logit_rows, s->vocab_width);
    s->scores = allocate_unset((size_t)threads * MAX_QUERIES, positions, sizeof(float), "the model's state");
    s->rope = floats(rows, c->head_size);
}

// For a text of up to n positions. Pages that it has not reached yet take no memory. Huge ones are read faster; but
// each head reaches its own, so that a large cache would take nearly all of its memory at the first token.
static KVCache new_cache(const Model *m, int n) {
    const Config *c = &m->config;
    KVCache cache = {.room = round_up((size_t)n, LANES)};
    const size_t position = (size_t)c->n_layers * (size_t)c->kv_dim * c->kv_bytes, bytes = 2 * cache.room * position;
    cache.block = calloc(2 * cache.room + CACHE_LINE / position + 1, position);
    if (!cache.block) {
        die("", "out of memory for the keys and values of %d tokens: %.0f MB; fewer (-n) take less", n,
            (double)bytes / 1e6);
    }
    cache.keys = (unsigned char *)cache.block + -(uintptr_t)cache.block % CACHE_LINE;
    cache.values = cache.keys + bytes / 2;
#ifdef MADV_HUGEPAGE
    const int advice = bytes > LARGE_CACHE ? MADV_NOHUGEPAGE : MADV_HUGEPAGE;
    if (bytes > HUGE_PAGE) advise(cache.keys, cache.keys + bytes, advice);
#endif
    return cache;
}

static void load_model(Model *m, const char *path, const Kernels *kernels) {
    const char *hint = "; train.py makes a model, and of a checkpoint: python export.py model.bin";
    *m = (Model){.kernels = kernels, .file = open_file(path, hint)};
    Walk f = {.file = &m->file};
    Config *c = &m->config;
    int version = read_header(&f, c);
    m->weights.layers = allocate(c->n_layers, 1, sizeof(Layer), "layers");
    walk_weights(&f, c, version, &m->weights);
    if (f.at > m->file.size) {
        die(path, "truncated: %zu bytes, but its header describes %zu" REMAKE, m->file.size, f.at);
    }
    if (f.at < m->file.size) {
        die(path, "damaged: %zu bytes, but its header describes only %zu" REMAKE, m->file.size, f.at);
    }
    m->pace = start_pace(m->file.size <= SMALL_MODEL);
    m->many_pace = start_pace(false);
    m->many_pace.pause = 2 * SHORTEST_PAUSE;  // a trial costs more, but its times waver less
    m->many_pace.hopeless = 1.2;
}

// Matrices are read by bands of LANES rows: vector after vector, each with 4 bytes of every row (a float, or 4
// int8), so that the sums of LANES rows grow side by side and no vector is ever added up. The file has int8 and
// fp32 weights by rows: these are copied into bands when the program starts, fp32 only of models that are not large;
// of larger ones the copy would take more time than it saves.
#ifndef PACKED_FP32
    #define PACKED_FP32 (128 << 20)  // bytes of a model file
#endif

// Copies a row (groups of `group` values, cols in all for fp32) and its scales (groups,) into its band.
static void pack_row(Tensor *t, int row, const unsigned char *in, const unsigned char *scale,
                     unsigned char weight_xor) {
    const bool fp32 = t->bits == 32;
    const size_t group_bytes = fp32 ? (size_t)t->cols * sizeof(float) : (size_t)t->group;
    const size_t at = (size_t)row / LANES * t->groups, lane = (size_t)row % LANES;
    unsigned char *out = (unsigned char *)(uintptr_t)t->values + at * t->units * BAND + lane * 4;
    unsigned char *scales = (unsigned char *)(uintptr_t)t->scales + (at * LANES + lane) * 4;
    if (lane == 0 && row + LANES > t->rows) {  // no rows fill this band
        memset(out, 0, t->groups * t->units * BAND);
        if (!fp32) memset(scales, 0, t->groups * BAND);
    }
    for (size_t g = 0; g < t->groups; g++, in += group_bytes) {
        uint32_t four;
        for (size_t u = 0; u < group_bytes / 4; u++, out += BAND) {
            memcpy(&four, in + u * 4, 4);
            four ^= weight_xor * 0x01010101u;
            memcpy(out, &four, 4);
        }
        if (group_bytes % 4) {
            four = 0;
            memcpy(&four, in + group_bytes / 4 * 4, group_bytes % 4);
            four ^= weight_xor * 0x01010101u;
            memcpy(out, &four, 4);
            out += BAND;
        }
        if (!fp32) memcpy(scales + g * LANES * 4, scale + g * 4, 4);
    }
}

static int matrices(const Config *c) { return 7 * c->n_layers + 1; }

// The i-th of the matrices that matmul reads
static Tensor *matrix(Weights *w, const Config *c, int i) {
    if (i == 7 * c->n_layers) return &w->wcls;
    Layer *y = &w->layers[i / 7];
    Tensor *all[] = {&y->wq, &y->wk, &y->wv, &y->wo, &y->w1, &y->w3, &y->w2};
    return all[i % 7];
}

// Room for the bands of all matrices, fp32 or int8
static void allocate_bands(Model *m) {
    size_t at = 0;
    for (int pass = 0; pass < 2; pass++, at = 0) {
        for (int i = 0; i < matrices(&m->config); i++) {
            Tensor *t = matrix(&m->weights, &m->config, i);
            if (t->bits == 32) {
                t->groups = 1;
                t->units = (size_t)t->cols;
            }
            const size_t groups = round_up((size_t)t->rows, LANES) / LANES * t->groups;
            if (pass == 1) {
                t->values = (unsigned char *)m->packed + at;
                t->scales = t->values + groups * t->units * BAND;
            }
            at += groups * (t->units + 1) * BAND;
        }
        if (pass == 0) m->packed = allocate_unset(at, 1, 1, "the weights");  // threads touch it first
    }
}

static void pack_share(void *context, int thread) {
    Model *m = context;
    for (int i = 0; i < matrices(&m->config); i++) {
        Tensor *t = matrix(&m->weights, &m->config, i);
        const bool fp32 = t->bits == 32;
        const unsigned char *source = fp32 ? (const unsigned char *)t->f : t->q;
        const size_t row_bytes = (size_t)t->cols * (fp32 ? sizeof(float) : 1), scale_bytes = fp32 ? 0 : t->groups * 4;
        int from, to;
        partition(t->rows, LANES, thread, m->pool->n, &from, &to);
        for (int r = from; r < to; r++) {
            pack_row(t, r, source + (size_t)r * row_bytes, fp32 ? NULL : t->scale + (size_t)r * scale_bytes,
                     fp32 ? 0 : m->kernels->weight_xor);
        }
#ifndef _WIN32  // gives back the memory of this part of the file; it is still there to be read again
        if (m->file.mapped) advise(source + (size_t)from * row_bytes, source + (size_t)to * row_bytes, MADV_DONTNEED);
#endif
    }
}

static void pack_model(Model *m) {
    if (m->config.bits == 4 || (m->config.bits == 32 && m->file.size > (size_t)PACKED_FP32)) return;
    allocate_bands(m);
    run_all(m->pool, pack_share, m);
}

static void free_model(Model *m) {
    free(m->packed);
    free_state(&m->state, m->pool->size);
    free(m->weights.layers);
    close_file(&m->file);
}

// ---------------------------------------------------------------------------------------------------------
// Forward

static void copy_row(float *restrict out, const Tensor *w, int row) {
    const size_t at = (size_t)row, cols = (size_t)w->cols;
    if (w->bits == 32) memcpy(out, w->f + at * cols, cols * sizeof(float));
    for (size_t g = 0; w->bits == 8 && g < w->groups; g++) {
        const float scale = f32_at(w->scale + (at * w->groups + g) * sizeof(float));
        const int8_t *q = (const int8_t *)w->q + at * cols + g * (size_t)w->group;
        for (int i = 0; i < w->group; i++) *out++ = (float)q[i] * scale;  // groups of int8 divide the columns
    }
    for (size_t i = 0; w->bits == 4 && i < cols; i++) {
        // a vector holds 4 columns in the lower halves of its bytes, and the next 4 in the upper ones
        const size_t group = at / LANES * w->groups + i / GROUP4, lane = at % LANES, unit = i % GROUP4 / 4;
        int both = w->values[(group * GROUP4 / 8 + unit / 2) * BAND + lane * 4 + i % 4];
        int value = unit % 2 ? both >> 4 : both & 15;
        out[i] = (float)(value - 8) * f16_at(w->scales + (group * LANES + lane) * 2);
    }
}

// Rotates each pair of neighbours in a head (RoFormer, arXiv 2104.09864) by the angles of one position.
static void rotate(float *v, int head_size, const float *rope) {
    for (int i = 0; i < head_size; i += 2) {
        float cosine = rope[i], sine = rope[i + 1], a = v[i], b = v[i + 1];
        v[i] = a * cosine - b * sine;
        v[i + 1] = a * sine + b * cosine;
    }
}

// What a matmul is to read, made of rows of a buffer. A single row every thread makes for itself: that takes less
// time than meeting.
static const Activation *prepare(Model *m, int thread, Activation *shared, int n, int cols, const float *x,
                                 const float *norm) {
    const Config *c = &m->config;
    Activation *to = n == 1 ? &m->state.own[thread] : shared;
    int from = 0, end = n;
    if (!norm && !c->group_size) return shared;
    if (n > 1) partition(n, 1, thread, m->pool->n, &from, &end);
    for (int b = from; b < end; b++) {
        float *out = to->f + (size_t)b * to->width;
        if (norm) m->kernels->rmsnorm(out, x + (size_t)b * c->dim, norm, cols, c->norm_eps);
        else if (n == 1) memcpy(out, shared->f, (size_t)cols * sizeof(float));
        // own buffers serve for widths of dim and hidden_dim: zeros behind the row
        for (int i = cols; n == 1 && i % LANES; i++) out[i] = 0.0f;
        if (c->group_size) m->kernels->quantize(to, b, cols, c->group_size, c->bits);
    }
    if (n > 1) barrier(m->pool);
    return to;
}

// Attention of some key/value heads: keys and values are stored for all rows, then each row looks back.
static void attention(Model *m, int thread, int layer) {
    const Config *c = &m->config;
    const RunState *s = &m->state;
    const int size = c->head_size, queries_per_kv = c->n_heads / c->n_kv_heads;
    const float scale = 1.0f / sqrtf((float)size);
    int from, to;
    partition(c->n_kv_heads, 1, thread, m->pool->n, &from, &to);
    for (int h = from; h < to; h++) {
        const size_t head = ((size_t)layer * c->n_kv_heads + h) * size;  // this many numbers of each position before
        for (int b = 0; b < m->n_rows; b++) {
            const Row *row = &m->rows[b];
            const size_t lane = (size_t)row->pos % LANES, kv = (size_t)b * c->kv_dim + (size_t)h * size;
            const size_t at = head * row->cache->room + ((size_t)row->pos - lane) * size + lane;
            rotate(s->k + kv, size, s->rope + (size_t)b * size);
            m->kernels->store_kv(row->cache->keys, at, s->k + kv, size, c->kv_bytes);
            m->kernels->store_kv(row->cache->values, at, s->v + kv, size, c->kv_bytes);
        }
        Query queries[MAX_QUERIES];
        int n = 0;
        for (int b = 0; b < m->n_rows; b++) {
            const Row *row = &m->rows[b];
            const size_t at = head * row->cache->room * c->kv_bytes;
            const bool last_of_text = b + 1 == m->n_rows || row->cache != m->rows[b + 1].cache;
            for (int i = h * queries_per_kv; i < (h + 1) * queries_per_kv; i++) {
                float *q = s->q + (size_t)b * c->dim + (size_t)i * size;
                rotate(q, size, s->rope + (size_t)b * size);
                for (int j = 0; j < size; j++) q[j] *= scale;
                queries[n++] = (Query){q, s->xb.f + (size_t)b * s->xb.width + (size_t)i * size, row->pos};
                if (n == MAX_QUERIES || (last_of_text && i + 1 == (h + 1) * queries_per_kv)) {
                    m->kernels->attend(n, queries, row->cache->keys + at, row->cache->values + at, c->kv_bytes,
                                       row->cache->room, size, s->scores + (size_t)thread * MAX_QUERIES * s->room);
                    n = 0;
                }
            }
        }
    }
}

// This thread's rows of out (n, ldo) = w @ x
static void multiply(Model *m, int thread, const Tensor *w, const Activation *x, int n, float *out, size_t ldo) {
    int from, to;
    partition(w->rows, LANES, thread, m->pool->n, &from, &to);
    float *scratch = m->state.scratch ? m->state.scratch + (size_t)thread * m->state.scratch_size : NULL;
    m->kernels->matmul(w, x, n, out, ldo, from, to, scratch);
}

// This thread's rows of x += w @ input
static void add_matmul(Model *m, int thread, const Tensor *w, const Activation *input) {
    RunState *s = &m->state;
    const int dim = m->config.dim;
    int from, to;
    multiply(m, thread, w, input, m->n_rows, s->add, dim);
    partition(dim, LANES, thread, m->pool->n, &from, &to);
    for (int b = 0; b < m->n_rows; b++) {
        float *x = s->x + (size_t)b * dim;
        const float *add = s->add + (size_t)b * dim;
        for (int i = from; i < to; i++) x[i] += add[i];
    }
}

static void run_layer(Model *m, int thread, int layer) {
    const Config *c = &m->config;
    const Layer *w = &m->weights.layers[layer];
    RunState *s = &m->state;
    Pool *pool = m->pool;
    const int n = m->n_rows;
    int from, to;

    const Activation *input = prepare(m, thread, &s->xb, n, c->dim, s->x, w->rms_att);
    multiply(m, thread, &w->wq, input, n, s->q, c->dim);
    multiply(m, thread, &w->wk, input, n, s->k, c->kv_dim);
    multiply(m, thread, &w->wv, input, n, s->v, c->kv_dim);
    barrier(pool);
    attention(m, thread, layer);
    barrier(pool);
    input = prepare(m, thread, &s->xb, n, c->dim, s->x, NULL);
    add_matmul(m, thread, &w->wo, input);
    barrier(pool);
    input = prepare(m, thread, &s->xb, n, c->dim, s->x, w->rms_ffn);
    multiply(m, thread, &w->w1, input, n, s->hb.f, s->hb.width);
    multiply(m, thread, &w->w3, input, n, s->hb2, c->hidden_dim);
    partition(c->hidden_dim, LANES, thread, pool->n, &from, &to);  // as multiply does
    for (int b = 0; b < n; b++) {
        m->kernels->swiglu(s->hb.f + (size_t)b * s->hb.width + from, s->hb2 + (size_t)b * c->hidden_dim + from,
                        to - from);
    }
    barrier(pool);
    input = prepare(m, thread, &s->hb, n, c->hidden_dim, s->x, NULL);
    add_matmul(m, thread, &w->w2, input);
    barrier(pool);
}

// One thread's share of a forward pass
static void forward_share(void *context, int thread) {
    Model *m = context;
    const Config *c = &m->config;
    RunState *s = &m->state;
    int from, to;
    partition(m->n_rows, 1, thread, m->pool->n, &from, &to);
    for (int b = from; b < to; b++) {
        copy_row(s->x + (size_t)b * c->dim, &m->weights.tok_embeddings, m->rows[b].token);
        float *rope = s->rope + (size_t)b * c->head_size;
        for (int i = 0; i < c->head_size; i += 2) {  // float32 throughout, as in PyTorch, where the model was trained
            const float frequency = 1.0f / powf(c->rope_theta, (float)i / (float)c->head_size);
            rope[i] = cosf((float)m->rows[b].pos * frequency);
            rope[i + 1] = sinf((float)m->rows[b].pos * frequency);
        }
    }
    barrier(m->pool);
    for (int l = 0; l < c->n_layers; l++) run_layer(m, thread, l);
    const int n = m->n_rows - m->first_logits;
    if (n == 0) return;
    const float *last = s->x + (size_t)m->first_logits * c->dim;
    const Activation *input = prepare(m, thread, &s->xb, n, c->dim, last, m->weights.rms_final);
    multiply(m, thread, &m->weights.wcls, input, n, s->logits, s->vocab_width);
}

// Feeds n tokens. Those from first_logits on have logits (vocab_size,) for the token that follows, in
// state.logits, each s->vocab_width before the next one's.
static void feed(Model *m, const Row *rows, int n, int first_logits) {
    reserve_state(m, n, n - first_logits, rows[0].cache->room);  // all rows' have the same
    m->rows = rows;
    m->n_rows = n;
    m->first_logits = first_logits;
    Pool *pool = m->pool;
    const bool one_text = rows[0].cache == rows[n - 1].cache;
    Pace *pace = pool->size == 1 ? NULL : n == 1 ? &m->pace : one_text ? NULL : &m->many_pace;
    const double start = pace ? now() : 0;
    pool->n = pace ? choose_threads(pace, pool->size) : pool->size;  // who samples, too
    run_all(pool, forward_share, m);
    if (pace) note_time(pace, (now() - start) / n);
}

static void check_logits(const Model *m, const float *logits, int pos) {
    if (m->kernels->finite(logits, m->config.vocab_size)) return;
    int i = 0;
    while (fabsf(logits[i]) <= FLT_MAX) i++;
    die(m->file.path, "the model computes %f for token %d at position %d: its weights are damaged",
        (double)logits[i], i, pos);
}

// feed(), and checks all logits; returns the first one's, or NULL when first_logits is n.
static float *forward(Model *m, const Row *rows, int n, int first_logits) {
    const RunState *s = &m->state;
    feed(m, rows, n, first_logits);
    if (first_logits == n) return NULL;
    for (int b = first_logits; b < n; b++) {
        check_logits(m, s->logits + (size_t)(b - first_logits) * s->vocab_width, rows[b].pos);
    }
    return s->logits;
}

// Feeds n tokens of one text, at most MAX_ROWS, from position pos on; returns the logits of the last `wanted` of them.
static float *forward_text(Model *m, KVCache *cache, const int *ids, int n, int pos, int wanted) {
    Row rows[MAX_ROWS];
    for (int i = 0; i < n; i++) rows[i] = (Row){ids[i], pos + i, cache};
    return forward(m, rows, n, n - wanted);
}

// Feeds n tokens of one text, any number, from position pos on; returns the last one's logits.
static float *prefill(Model *m, KVCache *cache, const int *ids, int n, int pos) {
    for (; n > MAX_ROWS; n -= MAX_ROWS, ids += MAX_ROWS, pos += MAX_ROWS) {
        forward_text(m, cache, ids, MAX_ROWS, pos, 0);
    }
    return forward_text(m, cache, ids, n, pos, 1);
}

// ---------------------------------------------------------------------------------------------------------
// Draft: a coarser copy of the weights, which memory gives up several times faster. It guesses some tokens ahead,
// and the model itself then reads its weights once to judge them all: self-speculative decoding (Leviathan et al.
// 2023). What is told does not depend on it, as the model's own choice is what counts at every token.

enum { MAX_DRAFT = 15 };             // tokens ahead
enum { DRAFT_GROUP = 32 };           // values that share a scale
enum { SHORT_STORY = 32 };           // tokens to come for which the copy is not worth its making

typedef struct {
    int max_tokens;                  // tokens ahead, at most; 0: off, -1: as many as pay
    Model model;                     // the same with coarser matrices, once it is made
    double acceptance_rate;          // share of the guesses that were right, lately; of so many seen,
    long seen;                       // the first of which count for more
    double guess, token, extra;      // seconds: of a guess, of a token without, that one with a guess to judge adds
    long rounds, drafted, accepted;  // choices of how many to guess; tokens guessed, and right
} Draft;

// Rounds this thread's rows of each matrix to int8.
static void draft_share(void *context, int thread) {
    Model *m = context;
    const Config *c = &m->config;
    Activation rounded = activation(c, 1, imax(c->dim, c->hidden_dim));
    for (int i = 0; i < matrices(c); i++) {
        Tensor *t = matrix(&m->weights, c, i);
        int from, to;
        partition(t->rows, LANES, thread, m->pool->n, &from, &to);
        for (int r = from; r < to; r++) {
            Activation row = rounded;
            row.f = (float *)(uintptr_t)(t->f + (size_t)r * (size_t)t->cols);
            m->kernels->quantize(&row, 0, t->cols, t->group, 8);
            pack_row(t, r, (unsigned char *)row.q, (unsigned char *)row.scale, m->kernels->weight_xor);
        }
    }
    free_activation(&rounded);
}

// Bytes that this machine has, or this process may have
static double memory_limit(void) {
    double bytes = HUGE_VAL;
#if defined(_SC_PHYS_PAGES) && !defined(_WIN32)
    bytes = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
#endif
#ifdef RLIMIT_AS
    struct rlimit limit;
    const bool limited = getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
    if (limited) bytes = fmin(bytes, (double)limit.rlim_cur);
#endif
    return fmin(bytes, container_limit(CONTAINER "memory.max"));
}

// Whether a copy of these weights may save time: of fp32 ones that are too large for a cache, where there is memory
static bool drafts_pay(const Model *m) {
    if (m->config.bits != 32 || m->file.size <= SMALL_MODEL || (double)m->file.size > memory_limit() / 2) return false;
    void *room = malloc(m->file.size / 3 + (16 << 20));  // and for the state of both
    free(room);
    return room != NULL;
}

static void make_draft(Draft *d, const Model *m) {
    *d = (Draft){.max_tokens = d->max_tokens, .model = *m, .acceptance_rate = 0.8};
    Model *copy = &d->model;
    Config *c = &copy->config;
    copy->state = (RunState){0};
    copy->pace = start_pace(false);
    c->bits = 8;
    c->group_size = DRAFT_GROUP;
    copy->weights.layers = allocate(c->n_layers, 1, sizeof(Layer), "the draft");
    memcpy(copy->weights.layers, m->weights.layers, (size_t)c->n_layers * sizeof(Layer));
    for (int i = 0; i < matrices(c); i++) {
        Tensor *t = matrix(&copy->weights, c, i);
        t->bits = c->bits;
        t->group = c->group_size;
        t->groups = ((size_t)t->cols + DRAFT_GROUP - 1) / DRAFT_GROUP;
        t->units = DRAFT_GROUP / 4;
    }
    allocate_bands(copy);
    copy->pool->n = copy->pool->size;
    run_all(copy->pool, draft_share, copy);
}

static void free_draft(Draft *d) {
    if (!d->model.packed) return;  // never made
    free(d->model.packed);
    free(d->model.weights.layers);
    free_state(&d->model.state, d->model.pool->size);
}

// How many tokens to guess ahead, at most so many, for the most tokens a second. Of n guesses, each right with
// probability a, 1 + a + ... + a^n tokens come. Now and then the other way is tried.
static int choose_draft(Draft *d, int most) {
    enum { TRY = 32, FEW = 2, FIRST = 4 };  // every 32nd time; before anything is known
    double tokens = 1, power = 1, best = 0;
    int n = 0;
    if (d->guess == 0) return imin(most, FIRST);
    for (int i = 0; i <= most; i++) {
        const double rate = tokens / (d->token + i * (d->guess + d->extra));
        if (rate > best) {
            best = rate;
            n = i;
        }
        power *= d->acceptance_rate;
        tokens += power;
    }
    if (++d->rounds % TRY == 0) n = n ? 0 : imin(most, FEW);
    return n;
}

// ---------------------------------------------------------------------------------------------------------
// Tokenizer: sentencepiece BPE from tokN.bin, with the same ids for every input

typedef struct {
    File file;              // the pieces' bytes lie here
    int size;
    const unsigned char **piece;  // (size,) not NUL-terminated; a space stands for sentencepiece's U+2581
    int *length;            // (size,)
    float *score;           // (size,) pairs with higher scores are merged first
    int byte_id[256];       // id of each byte's piece, -1 if there is none
    bool byte_fallback;     // all 256 are there
    int max_length;         // of a piece that text can match
    int *slots;             // (mask + 1,) hash table of ids, -1 is empty
    uint32_t mask;
} Tokenizer;

typedef struct {
    int *ids;
    int n;
} Tokens;

static uint32_t hash_bytes(const unsigned char *s, int n) {
    uint32_t h = 2166136261u;  // FNV-1a
    for (int i = 0; i < n; i++) h = (h ^ s[i]) * 16777619u;
    return h ^ h >> 15;
}

static int find_piece(const Tokenizer *t, const unsigned char *s, int n) {
    if (n > t->max_length) return -1;
    for (uint32_t i = hash_bytes(s, n) & t->mask; t->slots[i] >= 0; i = (i + 1) & t->mask) {
        int id = t->slots[i];
        if (t->length[id] == n && !memcmp(t->piece[id], s, (size_t)n)) return id;
    }
    return -1;
}

// The byte a piece like <0x0A> stands for, or -1.
static int parse_byte_piece(const unsigned char *s, int n) {
    static const char digits[] = "0123456789ABCDEF";
    if (n != 6 || memcmp(s, "<0x", 3) || s[5] != '>') return -1;
    const char *high = memchr(digits, s[3], 16), *low = memchr(digits, s[4], 16);
    return high && low ? (int)(16 * (high - digits) + (low - digits)) : -1;
}

static _Noreturn void bad_tokenizer(const File *file, const char *what, int id) {
    if (file->size > 0 && file->data[0] == '\n') {  // how sentencepiece's protobuf starts
        die(file->path, "this is a sentencepiece model; convert it: "
            "python tokenizer.py --tokenizer-model=%s", file->path);
    }
    die(file->path, "not a tokenizer .bin, or damaged: %s (token %d); make one of its .model: "
        "python tokenizer.py --tokenizer-model=FILE.model", what, id);
}

// Walks the entries {float32 score, uint32 length, bytes}: counts them while t->piece is NULL, else stores.
// How many there are is what the file holds: the format does not say.
static int walk_pieces(Tokenizer *t) {
    const File *f = &t->file;
    size_t at = 4;  // skips the longest length, which llama2.c needs and we compute
    int id = 0;
    for (; at < f->size; id++) {
        if (id >= MAX_WIDTH) bad_tokenizer(f, "too many tokens", id);
        if (f->size - at < 8) bad_tokenizer(f, "it ends inside a token", id);
        float score = f32_at(f->data + at);
        uint32_t length = (uint32_t)i32_at(f->data + at + 4);
        at += 8;
        if (length > f->size - at) bad_tokenizer(f, "a length goes beyond its end", id);
        if (length > MAX_WIDTH) bad_tokenizer(f, "a length is too large", id);
        if (isnan(score)) bad_tokenizer(f, "a score is not a number", id);
        if (t->piece) {
            t->piece[id] = f->data + at;
            t->length[id] = (int)length;
            t->score[id] = score;
        }
        at += length;
    }
    return id;
}

static void load_tokenizer(Tokenizer *t, const char *path) {
    const char *hint = "; make it of its .model: python tokenizer.py --tokenizer-model=FILE.model";
    *t = (Tokenizer){.file = open_file(path, hint)};
    if (t->file.size < 4) bad_tokenizer(&t->file, "too few bytes", 0);
    t->size = walk_pieces(t);
    if (t->size == 0) bad_tokenizer(&t->file, "no tokens in it", 0);
    size_t n = (size_t)t->size;
    t->piece = allocate(n, 1, sizeof *t->piece, "the tokenizer");
    t->length = allocate(n, 1, sizeof *t->length, "the tokenizer");
    t->score = allocate(n, 1, sizeof *t->score, "the tokenizer");
    walk_pieces(t);

    for (t->mask = 15; t->mask / 2 < n; ) t->mask = t->mask * 2 + 1;
    t->slots = allocate((size_t)t->mask + 1, 1, sizeof *t->slots, "the tokenizer");
    for (uint32_t i = 0; i <= t->mask; i++) t->slots[i] = -1;
    for (int b = 0; b < 256; b++) t->byte_id[b] = -1;
    for (int id = 0; id < t->size; id++) {
        int byte = parse_byte_piece(t->piece[id], t->length[id]);
        if (byte >= 0 && t->byte_id[byte] < 0) t->byte_id[byte] = id;
        // "<s>" or "<0x41>" typed by a user is text: special pieces stay out of the table
        if (id == UNK || id == BOS || id == EOS || byte >= 0 || t->length[id] == 0) continue;
        if (find_piece(t, t->piece[id], t->length[id]) >= 0) continue;  // of equal pieces, the first counts
        uint32_t slot = hash_bytes(t->piece[id], t->length[id]) & t->mask;
        while (t->slots[slot] >= 0) slot = (slot + 1) & t->mask;
        t->slots[slot] = id;
        if (t->length[id] > t->max_length) t->max_length = t->length[id];
    }
    t->byte_fallback = true;
    for (int b = 0; b < 256; b++) t->byte_fallback &= t->byte_id[b] >= 0;
}

static void free_tokenizer(Tokenizer *t) {
    void *buffers[] = {t->piece, t->length, t->score, t->slots};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    close_file(&t->file);
}

// Bytes of the well-formed UTF-8 character at s (Unicode 15, table 3-7), or 0.
static int utf8_length(const unsigned char *s, size_t n) {
    unsigned char c = s[0], low = 0x80, high = 0xBF;
    int length = c < 0x80 ? 1 : c < 0xC2 ? 0 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 0;
    if (c == 0xE0) low = 0xA0;   // overlong
    if (c == 0xED) high = 0x9F;  // surrogates
    if (c == 0xF0) low = 0x90;   // overlong
    if (c == 0xF4) high = 0x8F;  // above U+10FFFF
    if ((size_t)length > n) return 0;
    for (int i = 1; i < length; i++, low = 0x80, high = 0xBF) {
        if (s[i] < low || s[i] > high) return 0;
    }
    return length;
}

typedef struct {
    int start, length;  // bytes of the normalised text; length 0: merged into its left neighbour
    int prev, next;     // neighbours, -1 at the ends
} Symbol;

typedef struct {
    float score;
    int left, right, length;  // length tells a pair whose symbols have changed since
} Pair;

typedef struct {
    const Tokenizer *tokenizer;
    unsigned char *text;  // normalised
    Symbol *symbols;
    int n_symbols;
    Pair *heap;           // best pair first
    int n_pairs;
} Merger;

static bool pair_before(const Pair *a, const Pair *b) {
    return a->score > b->score || (a->score == b->score && a->left < b->left);
}

static void push_pair(Merger *m, int left, int right) {
    if (left < 0 || right < 0) return;
    int length = m->symbols[left].length + m->symbols[right].length;
    int id = find_piece(m->tokenizer, m->text + m->symbols[left].start, length);
    if (id < 0) return;
    Pair pair = {m->tokenizer->score[id], left, right, length};
    int i = m->n_pairs++;
    for (int parent; i > 0; i = parent) {
        parent = (i - 1) / 2;
        if (!pair_before(&pair, &m->heap[parent])) break;
        m->heap[i] = m->heap[parent];
    }
    m->heap[i] = pair;
}

static Pair pop_pair(Merger *m) {
    Pair top = m->heap[0], last = m->heap[--m->n_pairs];
    int i = 0;
    for (int child; (child = 2 * i + 1) < m->n_pairs; i = child) {
        if (child + 1 < m->n_pairs && pair_before(&m->heap[child + 1], &m->heap[child])) child++;
        if (!pair_before(&m->heap[child], &last)) break;
        m->heap[i] = m->heap[child];
    }
    m->heap[i] = last;
    return top;
}

// One symbol per character: a space first (sentencepiece's dummy prefix), U+2581 as a space, and U+FFFD for
// every byte that is not part of well-formed UTF-8, as sentencepiece does.
static void split_characters(Merger *m, const unsigned char *text, size_t n) {
    int at = 0;
    for (size_t i = 0; i < n || m->n_symbols == 0; ) {
        const unsigned char *c = text + i;
        int length = 1, used = 0;
        if (m->n_symbols == 0) {
            c = (const unsigned char *)" ";
        } else if ((length = used = utf8_length(c, n - i)) == 0) {
            c = (const unsigned char *)"\xEF\xBF\xBD";
            length = 3;
            used = 1;
        } else if (length == 3 && !memcmp(c, "\xE2\x96\x81", 3)) {
            c = (const unsigned char *)" ";
            length = 1;
        }
        int k = m->n_symbols++;
        m->symbols[k] = (Symbol){at, length, k - 1, k + 1};
        memcpy(m->text + at, c, (size_t)length);
        at += length;
        i += (size_t)used;
    }
    m->symbols[m->n_symbols - 1].next = -1;
}

// Merges the best pair until none is left: the linked list and heap of sentencepiece's bpe_model, O(n log n).
static void merge_symbols(Merger *m) {
    for (int i = 1; i < m->n_symbols; i++) push_pair(m, i - 1, i);
    while (m->n_pairs > 0) {
        Pair pair = pop_pair(m);
        Symbol *left = &m->symbols[pair.left], *right = &m->symbols[pair.right];
        if (!left->length || !right->length || left->length + right->length != pair.length) continue;
        left->length = pair.length;
        left->next = right->next;
        if (right->next >= 0) m->symbols[right->next].prev = pair.left;
        right->length = 0;
        push_pair(m, left->prev, pair.left);
        push_pair(m, pair.left, left->next);
    }
}

static void emit_symbol(Tokens *out, const Tokenizer *t, const unsigned char *s, int n) {
    int id = find_piece(t, s, n);
    if (id >= 0) {
        out->ids[out->n++] = id;
    } else if (t->byte_fallback) {
        if (n == 1 && *s == ' ') {  // sentencepiece spells out U+2581, which this space stands for
            s = (const unsigned char *)"\xE2\x96\x81";
            n = 3;
        }
        for (int i = 0; i < n; i++) out->ids[out->n++] = t->byte_id[s[i]];
    } else if (out->ids[out->n - 1] != UNK) {
        out->ids[out->n++] = UNK;  // a run of unknown characters is one token
    }
}

// The prompt's ids, BOS first. The caller frees ids.
static Tokens encode(const Tokenizer *t, const char *text, size_t n) {
    const int most = (INT_MAX - 64) / 16;
    if (n > (size_t)most) die("", "a text of %zu bytes is too long; %d are the most for one story", n, most);
    Merger m = {.tokenizer = t};
    m.text = allocate(n + 1, 3, 1, "the prompt");
    m.symbols = allocate(n + 1, 1, sizeof(Symbol), "the prompt");
    m.heap = allocate(n + 1, 2, sizeof(Pair), "the prompt");  // n pairs to begin with, and each merge adds 1
    Tokens out = {allocate(n + 1, 4, sizeof(int), "the prompt"), 0};
    out.ids[out.n++] = BOS;
    if (n > 0) {
        split_characters(&m, (const unsigned char *)text, n);
        merge_symbols(&m);
        for (int i = 0; i >= 0; i = m.symbols[i].next) {
            emit_symbol(&out, t, m.text + m.symbols[i].start, m.symbols[i].length);
        }
    }
    free(m.text);
    free(m.symbols);
    free(m.heap);
    return out;
}

// Appends the text of a token. A model may know ids the tokenizer does not: they have none.
static void append_token(Text *out, const Tokenizer *t, int prev, int id) {
    if (id < 0 || id >= t->size) return;
    const unsigned char *s = t->piece[id];
    int n = t->length[id];
    const int value = parse_byte_piece(s, n);
    const unsigned char byte = (unsigned char)value;
    if (value >= 0) {  // half of an emoji, perhaps: bytes above 127 are printed as they are
        s = &byte;
        n = 1;
    } else if (prev == BOS && n > 0 && s[0] == ' ') {  // the dummy prefix
        s++;
        n--;
    }
    for (int i = 0; i < n; i++) {
        bool control = (s[i] < 32 && !(s[i] >= '\t' && s[i] <= '\r')) || s[i] == 127;
        if (!control) text_append(out, &s[i], 1);  // no escape sequences on the user's terminal
    }
}

// ---------------------------------------------------------------------------------------------------------
// Sampler: the same random numbers and the same order of operations as llama2.c, so the same seed tells the
// same story

typedef struct {
    float p;
    int id;
} Candidate;

typedef struct {
    int n;                  // vocab_size
    float temperature;      // 0: always the most likely token
    float topp;             // sample from the most likely tokens that together exceed this; off at <= 0, >= 1
    int topk;               // and from no more than so many; 0: off
    const Kernels *kernels;
} Sampler;

static float random_float(uint64_t *state) {  // in [0, 1), from xorshift64* (Vigna, arXiv 1402.6246)
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)((*state * 0x2545F4914F6CDD1Dull) >> 40) / 16777216.0f;
}

static int argmax(const float *x, int n) {
    enum { STRETCH = 256 };  // the largest stretch is found first: that loop keeps no index
    float best = -INFINITY;
    int at = 0;
    for (int i = 0; i < n; i += STRETCH) {
        float top[8] = {x[i], x[i], x[i], x[i], x[i], x[i], x[i], x[i]};
        int end = i + imin(STRETCH, n - i), j = i;
        for (; j + 8 <= end; j += 8) {
            for (int k = 0; k < 8; k++) top[k] = x[j + k] > top[k] ? x[j + k] : top[k];
        }
        for (; j < end; j++) top[0] = x[j] > top[0] ? x[j] : top[0];
        for (int k = 1; k < 8; k++) top[0] = top[k] > top[0] ? top[k] : top[0];
        if (top[0] > best) {
            best = top[0];
            at = i;
        }
    }
    while (x[at] != best) at++;
    return at;
}

static int sample_multinomial(const float *p, int n, float coin) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) {
        sum += p[i];
        if (coin < sum) return i;
    }
    return n - 1;  // the sum was rounded below the coin
}

static bool more_likely(const Candidate *a, const Candidate *b) {
    return a->p > b->p || (a->p == b->p && a->id < b->id);
}

static void sift_down(Candidate *heap, int i, int n) {
    Candidate moving = heap[i];
    for (int child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && more_likely(&heap[child + 1], &heap[child])) child++;
        if (!more_likely(&heap[child], &moving)) break;
        heap[i] = heap[child];
    }
    heap[i] = moving;
}

// Sorts candidates so that the most likely comes last and of equals the smaller id: three passes of counting sort on
// the bits of p, which for positive floats are ordered as p is. spare has room for n.
static void sort_candidates(Candidate *c, int n, Candidate *spare) {
    enum { BITS = 11, BUCKETS = 1 << BITS };
    for (int i = 0; i < n / 2; i++) {  // ids from large to small, as the passes keep the order of equals
        Candidate swap = c[i];
        c[i] = c[n - 1 - i];
        c[n - 1 - i] = swap;
    }
    for (int pass = 0; pass < 3; pass++) {
        int start[BUCKETS + 1] = {0};
        uint32_t bits;
        for (int i = 0; i < n; i++) {
            memcpy(&bits, &c[i].p, sizeof bits);
            start[(bits >> pass * BITS) % BUCKETS + 1]++;
        }
        for (int b = 0; b < BUCKETS; b++) start[b + 1] += start[b];
        for (int i = 0; i < n; i++) {
            memcpy(&bits, &c[i].p, sizeof bits);
            spare[start[(bits >> pass * BITS) % BUCKETS]++] = c[i];
        }
        memcpy(c, spare, (size_t)n * sizeof *c);
    }
}

// c has room for 2 n candidates
static int sample_top(const Sampler *s, const float *p, float coin, Candidate *c) {
    // what is below this cannot be in the set, whatever the other n - 1 are
    const bool by_share = s->topp > 0 && s->topp < 1;
    const float topp = by_share ? s->topp : INFINITY;
    const float cutoff = by_share && s->n > 1 ? (1.0f - topp) / (float)(s->n - 1) : 0.0f;
    int n = 0;
    for (int i = 0; i < s->n; i++) {
        c[n] = (Candidate){p[i], i};
        n += p[i] >= cutoff;
    }
    if (n == 0) return argmax(p, s->n);  // flat probabilities and a tiny topp

    // The chosen end up, most likely first, at c[n-1], c[n-2], ..., c[n-chosen]: many candidates are sorted, of a few
    // a heap gives one after the other until topp is reached.
    enum { FEW = 512 };
    float sum = 0.0f;
    int chosen = 0;
    if (n > FEW) sort_candidates(c, n, c + s->n);
    else for (int i = n / 2 - 1; i >= 0; i--) sift_down(c, i, n);
    while (chosen < n && sum <= topp && (s->topk == 0 || chosen < s->topk)) {
        const int last = n - 1 - chosen++;
        if (n <= FEW) {
            Candidate best = c[0];
            c[0] = c[last];
            if (last > 0) sift_down(c, 0, last);
            c[last] = best;
        }
        sum += c[last].p;
    }
    float target = coin * sum, reached = 0.0f;
    for (int i = 0; i < chosen; i++) {
        reached += c[n - 1 - i].p;
        if (target < reached) return c[n - 1 - i].id;
    }
    return c[n - chosen].id;
}

// Overwrites the logits (n,), which forward() has found to be finite and left room behind for whole vectors.
static int sample(const Sampler *s, float *logits, uint64_t *rng, Candidate *candidates) {
    int best = argmax(logits, s->n);
    // a temperature so low that the division overflows is as good as 0
    if (s->temperature == 0 || !isfinite(logits[best] / s->temperature)) return best;
    for (int i = 0; s->temperature != 1 && i < s->n; i++) logits[i] /= s->temperature;
    s->kernels->softmax(logits, s->n);
    float coin = random_float(rng);
    if ((s->topp <= 0 || s->topp >= 1) && s->topk == 0) return sample_multinomial(logits, s->n, coin);
    return sample_top(s, logits, coin, candidates);
}

// ---------------------------------------------------------------------------------------------------------
// Generate and chat

enum { MAX_STORIES = 32 };  // at once: more gain nothing

typedef struct {            // a text in the making
    KVCache cache;
    uint64_t rng;
    int pos;                // the next free position
    int prev, next;         // the last token shown and the one to come
    bool done;
    Text text;              // what cannot be printed yet
} Story;

typedef struct {
    Model model;
    Tokenizer tokenizer;
    Sampler sampler;
    Candidate *candidates;  // (threads, 2, vocab_size)
    Draft draft;
    int limit;              // positions that may be used
    Story *active[MAX_STORIES]; // the stories that are being told at once
    bool flush_each;        // stdout is a terminal: show each token at once,
    double flushed;         // or else what came since then, a few times a second
    bool plain;             // chat without a template
} Session;

typedef struct {            // of one run, in seconds and tokens
    double load, prompt, first, decode;
    long prompt_tokens, decoded;
    int stories;
} Stats;

// Resident memory at its highest, in bytes; 0 where it is not known
static double peak_memory(void) {
#if defined(_WIN32)
    return 0;
#else
    char line[256];
    long kilobytes = 0;
    FILE *f = fopen("/proc/self/status", "r");  // Linux, where getrusage gives its parent's, if that was larger
    while (f && fgets(line, sizeof line, f) && sscanf(line, "VmHWM: %ld", &kilobytes) != 1) {}
    if (f) fclose(f);
    if (kilobytes > 0) return (double)kilobytes * 1024;
    struct rusage usage;
    if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
#if defined(__APPLE__)
    return (double)usage.ru_maxrss;
#else
    return (double)usage.ru_maxrss * 1024;
#endif
#endif
}

static double per_second(long n, double seconds) { return seconds > 0 ? (double)n / seconds : 0; }

static void print_stats(const Session *s, const Stats *t) {
    fprintf(stderr, "{\"threads\": %d, \"kernels\": \"%s\", \"stories\": %d, \"load_seconds\": %.6f, "
            "\"prompt_tokens\": %ld, \"prompt_seconds\": %.6f, \"prompt_tok_s\": %.1f, "
            "\"first_token_seconds\": %.6f, \"decoded_tokens\": %ld, \"decode_seconds\": %.6f, "
            "\"decode_tok_s\": %.1f, \"drafted_tokens\": %ld, \"accepted_tokens\": %ld, \"memory_bytes\": %.0f}\n",
            s->model.pool->size, s->model.kernels->name, t->stories, t->load, t->prompt_tokens, t->prompt,
            per_second(t->prompt_tokens, t->prompt), t->first, t->decoded, t->decode,
            per_second(t->decoded, t->decode), s->draft.drafted, s->draft.accepted, peak_memory());
}

// Encodes text for this model and refuses tokens that it does not have.
static Tokens encode_text(const Session *s, const char *text, size_t n) {
    Tokens t = encode(&s->tokenizer, text, n);
    for (int i = 0; i < t.n; i++) {
        if (t.ids[i] >= s->model.config.vocab_size) {
            die(s->tokenizer.file.path, "the prompt needs token %d, but the model has only %d; "
                "use its own tokenizer (-z)", t.ids[i], s->model.config.vocab_size);
        }
    }
    return t;
}

// The same of a text that must fit into the context
static Tokens encode_prompt(const Session *s, const Text *text) {
    const int seq_len = s->model.config.seq_len;
    Tokens t = encode_text(s, text->data, text->len);
    if (t.n > seq_len) {
        die(s->model.file.path, "the prompt is %d tokens long, but the model's context holds %d; shorten it",
            t.n, seq_len);
    }
    return t;
}

static void print_text(Session *s, Text *t) {
    if (t->len && fwrite(t->data, 1, t->len, stdout) < t->len) flush_stdout();  // which dies
    t->len = 0;
    if (s->flush_each || now() - s->flushed > 0.1) {
        flush_stdout();
        s->flushed = now();
    }
}

static bool ends(int id) { return id == BOS || id == EOS; }

// Chooses the next token of each story that was fed one, by its own random numbers.
static void sample_share(void *context, int thread) {
    const Session *s = context;
    const RunState *state = &s->model.state;
    int from, to;
    partition(s->model.n_rows, 1, thread, s->model.pool->n, &from, &to);
    for (int i = from; i < to; i++) {
        Story *story = s->active[i];
        story->next = sample(&s->sampler, state->logits + (size_t)i * state->vocab_width, &story->rng,
                             s->candidates + (size_t)thread * 2 * (size_t)s->sampler.n);
    }
}

// Adds the token that was chosen to a story's text; true when another one can follow it.
static bool accept_token(Session *s, Story *story) {
    if (ends(story->next)) return false;
    append_token(&story->text, &s->tokenizer, story->prev, story->next);
    story->prev = story->next;
    return story->pos < s->limit;
}

// What stories begin with: tokens of which the first `fed` have gone through the model
typedef struct {
    Tokens tokens;
    int fed;
    KVCache cache;
    float *logits;  // (vocab_size,) after the last of them
} Prompt;

// Begins a story with the prompt and its first token, with a copy of the prompt's memory or, the last one, with that.
static void begin_story(Session *s, Story *story, const Prompt *prompt, bool last, uint64_t seed) {
    const Config *c = &s->model.config;
    const Tokens *t = &prompt->tokens;
    *story = (Story){.rng = seed ? seed : 1, .pos = prompt->fed, .prev = BOS, .next = BOS};
    story->cache = prompt->cache;
    if (!last) {
        const size_t size = (size_t)c->head_size * c->kv_bytes, bytes = round_up((size_t)prompt->fed, LANES) * size;
        story->cache = new_cache(&s->model, s->limit);
        for (size_t h = 0; h < (size_t)c->n_layers * (size_t)c->n_kv_heads; h++) {
            const size_t at = h * story->cache.room * size;
            memcpy(story->cache.keys + at, prompt->cache.keys + at, bytes);
            memcpy(story->cache.values + at, prompt->cache.values + at, bytes);
        }
    }
    for (int i = 1; i < t->n && i <= s->limit; i++) {
        append_token(&story->text, &s->tokenizer, story->prev, t->ids[i]);
        story->prev = t->ids[i];
    }
    story->done = prompt->fed < t->n;
    if (story->done) return;
    memcpy(s->model.state.logits, prompt->logits, (size_t)s->sampler.n * sizeof(float));
    story->next = sample(&s->sampler, s->model.state.logits, &story->rng, s->candidates);
    story->done = !accept_token(s, story);
}

// Makes the draft of a story that goes on from position pos, if one is wanted.
static void prepare_draft(Session *s, int pos) {
    Draft *d = &s->draft;
    if (d->max_tokens < 0) d->max_tokens = s->limit - pos > SHORT_STORY && drafts_pay(&s->model) ? MAX_DRAFT : 0;
    if (s->model.config.bits != 32) d->max_tokens = 0;
    if (d->max_tokens > 0 && !d->model.packed) make_draft(d, &s->model);
}

// Chooses one or more tokens of a story, the last of which is story->next: as many as the draft guessed, and one.
static void decode_step(Session *s, Story *story) {
    Model *m = &s->model;
    Draft *d = &s->draft;
    Row rows[MAX_DRAFT + 1];
    const int most = imin(d->max_tokens, s->limit - 1 - story->pos);
    const int wanted = most > 0 && d->token > 0 ? choose_draft(d, most) : 0;
    uint64_t rng = story->rng;  // the guesses see the same random numbers, which makes them agree more often
    int drafted = 0, accepted = 0;
    double start = now();
    rows[0] = (Row){story->prev, story->pos, &story->cache};
    while (drafted < wanted) {
        feed(&d->model, &rows[drafted], 1, 0);
        if (!m->kernels->finite(d->model.state.logits, s->sampler.n)) break;
        const int id = sample(&s->sampler, d->model.state.logits, &rng, s->candidates);
        if (ends(id)) break;
        drafted++;
        rows[drafted] = (Row){id, story->pos + drafted, &story->cache};
    }
    double guessed = now();
    feed(m, rows, drafted + 1, 0);
    double verify_time = now() - guessed;
    for (;; accepted++) {
        float *logits = m->state.logits + (size_t)accepted * m->state.vocab_width;
        check_logits(m, logits, story->pos++);  // not those after a wrong guess: they are of a text nobody tells
        story->next = sample(&s->sampler, logits, &story->rng, s->candidates);
        if (accepted == drafted || story->next != rows[accepted + 1].token) break;
        accept_token(s, story);
    }
    if (drafted == 0) average(&d->token, verify_time);
    else {
        average(&d->guess, (guessed - start) / drafted);
        average(&d->extra, fmax(verify_time - d->token, 0) / drafted);
        for (int i = 0; i <= accepted && i < drafted; i++) {
            d->seen++;
            // what it began with counts as four guesses
            d->acceptance_rate += ((i < accepted) - d->acceptance_rate) / (double)(d->seen < 28 ? d->seen + 4 : 32);
        }
    }
    d->drafted += drafted;
    d->accepted += accepted;
}

// Tells `count` stories, of which the first has begun, as many at once as there is room for. Each is the story it
// would be alone, and they are printed in order. Returns how many tokens they took.
static long decode_stories(Session *s, Story *stories, int count, const Prompt *prompt, uint64_t seed) {
    Model *m = &s->model;
    const double each = 2.0 * m->config.n_layers * m->config.kv_dim * (double)m->config.kv_bytes * s->limit;
    const double room = (memory_limit() / 2 - (double)m->file.size) / 2 / each;
    const int most = room < 1 ? 1 : room < MAX_STORIES ? (int)room : MAX_STORIES;
    Story **active = s->active;
    Row rows[MAX_STORIES];
    long tokens = 0;
    int n = 0, begun = 0;
    for (int shown = 0; shown < count;) {
        for (; n < most && begun < count; n++, begun++) {
            active[n] = &stories[begun];
            if (begun > 0) begin_story(s, active[n], prompt, begun + 1 == count, seed + (uint64_t)begun);
        }
        int left = 0;
        for (int i = 0; i < n; i++) {
            if (active[i]->done) free(active[i]->cache.block);
            else active[left++] = active[i];
        }
        n = left;
        for (; shown < begun; shown++) {
            print_text(s, &stories[shown].text);
            if (!stories[shown].done) break;
            putchar('\n');
            free(stories[shown].text.data);
        }
        if (n == 1 && begun == count) {  // the last one, or the only
            const int pos = active[0]->pos;
            prepare_draft(s, pos);  // with the first token on show already
            decode_step(s, active[0]);
            tokens += active[0]->pos - pos;
        } else if (n > 0) {
            for (int i = 0; i < n; i++) rows[i] = (Row){active[i]->prev, active[i]->pos++, &active[i]->cache};
            forward(m, rows, n, 0);
            run_all(m->pool, sample_share, s);
            tokens += n;
        }
        for (int i = 0; i < n; i++) active[i]->done = !accept_token(s, active[i]);
    }
    return tokens;
}

// Tells `count` stories that begin with the prompt, with the seeds seed, seed + 1, ...
static void generate(Session *s, const Text *text, int count, uint64_t seed, Stats *stats) {
    Prompt prompt = {encode_prompt(s, text), .cache = new_cache(&s->model, s->limit)};
    const Tokens *t = &prompt.tokens;
    prompt.fed = imin(t->n, s->limit);
    if (prompt.fed < t->n) {
        warn("-n", "the prompt is %d tokens long, only its first %d are used", t->n, prompt.fed);
    }
    Story *stories = allocate(count, 1, sizeof(Story), "stories");
    double start = now();
    const float *logits = prefill(&s->model, &prompt.cache, t->ids, prompt.fed, 0);
    double prompted = now();
    prompt.logits = floats(s->sampler.n, 1);
    memcpy(prompt.logits, logits, (size_t)s->sampler.n * sizeof(float));
    begin_story(s, &stories[0], &prompt, count == 1, seed);
    stats->first = now() - start;
    stats->decoded = decode_stories(s, stories, count, &prompt, seed);
    flush_stdout();
    double end = now();
    stats->prompt = prompted - start;
    stats->prompt_tokens = prompt.fed;
    stats->decode = end - prompted;
    stats->stories = count;
    const int pos = stories[0].pos;
    // as llama2.c: its clock starts after the first token; of the length, BOS and the end token are part
    const double seconds = end - (prompt.fed == 1 ? prompted : start);
    if (count > 1) {
        fprintf(stderr, "achieved tok/s: %f (%ld tokens in %d stories)\n",
                per_second(stats->decoded, stats->decode), stats->decoded + (prompt.fed == t->n ? count : 0), count);
    } else if (pos > 1 && seconds > 0) {
        fprintf(stderr, "achieved tok/s: %f (%d tokens%s)\n", (pos - 1) / seconds, pos + 1,
                prompt.fed == t->n && ends(stories[0].next) ? "" : ", cut off");
    }
    free(prompt.logits);
    free(stories);
    free(prompt.tokens.ids);
}

// Prints a question and reads a line of any length, without its newline. False at the end of input.
static bool ask(const char *question, Text *line) {
    int c;
    fputs(question, stdout);
    flush_stdout();
    line->len = 0;
    text_append(line, "", 0);
    while ((c = getchar()) != EOF && c != '\n') text_append(line, &(char){(char)c}, 1);
    if (ferror(stdin)) die("stdin", "cannot read: %s", strerror(errno));
    if (c == '\n' && line->len > 0 && line->data[line->len - 1] == '\r') line->len--;
    return c != EOF || line->len > 0;
}

// One turn in the template Llama 2's chat models were trained with; or plain, for models that were trained with
// none: they go on with the text so far.
static void render_turn(Text *out, const Text *system, const Text *user, bool plain) {
    out->len = 0;
    if (!plain) text_append_string(out, "[INST] ");
    if (system->len) {
        if (!plain) text_append_string(out, "<<SYS>>\n");
        text_append(out, system->data, system->len);
        text_append_string(out, plain ? "\n" : "\n<</SYS>>\n\n");
    }
    text_append(out, user->data, user->len);
    if (!plain) text_append_string(out, " [/INST]");
}

// Samples an answer up to its end or the end of the context.
static void answer(Session *s, Story *chat, const Tokens *t, Stats *stats) {
    Model *m = &s->model;
    const double start = now();
    if (!s->plain) text_append_string(&chat->text, "Assistant: ");
    chat->prev = t->ids[t->n - 1];
    prefill(m, &chat->cache, t->ids, t->n, chat->pos);
    const double prompted = now();
    chat->next = sample(&s->sampler, m->state.logits, &chat->rng, s->candidates);
    if (stats->stories++ == 0) stats->first = now() - start;
    chat->pos += t->n;
    const int asked = chat->pos;
    if (chat->pos < s->limit) prepare_draft(s, chat->pos);
    while (accept_token(s, chat)) {
        print_text(s, &chat->text);
        decode_step(s, chat);
    }
    if (chat->pos < s->limit && !s->plain) {  // the template closes every answer
        Row row = {EOS, chat->pos++, &chat->cache};
        forward(m, &row, 1, 1);
    }
    stats->prompt_tokens += t->n;
    stats->prompt += prompted - start;
    stats->decoded += chat->pos - asked;
    stats->decode += now() - prompted;
    print_text(s, &chat->text);
    putchar('\n');
    flush_stdout();
}

static void chat(Session *s, const Text *first_user, const char *first_system, uint64_t seed, Stats *stats) {
    const int seq_len = s->model.config.seq_len, vocab_size = s->model.config.vocab_size;
    Text system = {0}, user = {0}, turn = {0};
    Story story = {.cache = new_cache(&s->model, s->limit), .rng = seed};
    for (int turns = 0; ; turns++) {
        system.len = 0;
        if (turns == 0 && first_system) {
            text_append_string(&system, first_system);
        } else if (turns == 0 && !s->plain) {
            ask("Enter system prompt (optional): ", &system);
        }
        if (turns == 0 && first_user->data) {
            text_append(&user, first_user->data, first_user->len);
        } else if (!ask("User: ", &user)) {
            putchar('\n');
            break;
        }
        render_turn(&turn, &system, &user, s->plain);
        Tokens t = encode_text(s, turn.data, turn.len);
        bool fits = t.n <= s->limit - story.pos;
        if (!fits && turns == 0) {
            die(s->limit < seq_len ? "-n" : s->model.file.path, "the first prompt is %d tokens long, more than %d",
                t.n, s->limit);
        }
        if (turns == 0 && !s->plain && vocab_size != 32000) {
            warn("note", "questions are put as to Llama 2's chat models, of 32000 tokens; a model with %d may do "
                 "better with --template plain, which lets it go on where you stop", vocab_size);
        }
        if (fits) answer(s, &story, &t, stats);
        free(t.ids);
        if (!fits || story.pos == s->limit) {
            fprintf(stderr, "run: the context of %d tokens is full, the chat ends here%s\n", s->limit,
                    s->limit < seq_len ? " (-n 0 uses all the model has)" : "");
            break;
        }
    }
    free(story.cache.block);
    free(story.text.data);
    free(system.data);
    free(user.data);
    free(turn.data);
}

// --tokens: the prompt's ids on one line
static void print_tokens(const Session *s, const Text *prompt) {
    Tokens t = encode(&s->tokenizer, prompt->data, prompt->len);
    for (int i = 0; i < t.n; i++) printf("%s%d", i ? " " : "", t.ids[i]);
    putchar('\n');
    free(t.ids);
}

// --logits: a line of vocab_size numbers for each position of the prompt
static void print_logits(Session *s, const Text *prompt) {
    Tokens t = encode_prompt(s, prompt);
    if (t.n > s->limit) die("-n", "the prompt is %d tokens long, more than -n allows", t.n);
    const int vocab_size = s->model.config.vocab_size;
    KVCache cache = new_cache(&s->model, t.n);
    for (int pos = 0, n; pos < t.n; pos += n) {
        n = imin(LOGIT_ROWS, t.n - pos);
        float *logits = forward_text(&s->model, &cache, t.ids + pos, n, pos, n);
        for (int j = 0; j < n; j++, logits += s->model.state.vocab_width) {
            for (int i = 0; i < vocab_size; i++) printf("%s%.9g", i ? " " : "", (double)logits[i]);
            putchar('\n');
        }
    }
    free(cache.block);
    free(t.ids);
}

// The first place of `what` in from..to, or NULL
static char *find_bytes(char *from, const char *to, const char *what) {
    const size_t n = strlen(what);
    for (; (size_t)(to - from) >= n; from++) {
        if (!memcmp(from, what, n)) return from;
    }
    return NULL;
}

// --perplexity: how well the model foresees each token of some stories, and their ends. They are separated by
// <|endoftext|>; of one longer than the context, each part begins with none.
static void print_perplexity(Session *s, const char *path, Stats *stats) {
    static const char separator[] = "<|endoftext|>";
    Text text = read_text(path);
    const int vocab_size = s->model.config.vocab_size, seq_len = s->model.config.seq_len;
    double nats = 0, start = now();
    size_t bytes = 0;
    for (char *p = text.data, *next; p; p = next) {
        next = find_bytes(p, text.data + text.len, separator);
        char *end = next ? next : text.data + text.len;
        while (p < end && isspace((unsigned char)*p)) p++;
        while (p < end && isspace((unsigned char)end[-1])) end--;
        if (next) next += sizeof separator - 1;
        if (p == end) continue;
        Tokens t = encode_text(s, p, (size_t)(end - p));
        KVCache cache = new_cache(&s->model, imin(t.n, seq_len));
        for (int at = 0, n; at < t.n; at += n) {
            const int pos = at % seq_len;
            n = imin(LOGIT_ROWS, imin(t.n - at, seq_len - pos));
            const float *logits = forward_text(&s->model, &cache, t.ids + at, n, pos, n);
            for (int i = 0; i < n; i++, logits += s->model.state.vocab_width) {
                const int target = at + i + 1 < t.n ? t.ids[at + i + 1] : BOS;
                double sum = 0, top = (double)logits[argmax(logits, vocab_size)];
                for (int j = 0; j < vocab_size; j++) sum += exp((double)logits[j] - top);
                nats += top + log(sum) - (double)logits[target];
            }
        }
        free(cache.block);
        stats->prompt_tokens += t.n;
        stats->stories++;
        bytes += (size_t)(end - p);
        free(t.ids);
    }
    if (stats->stories == 0) die(path, "there is no text in it; name a file of stories: --perplexity FILE");
    stats->prompt = now() - start;
    const double mean = nats / (double)stats->prompt_tokens;
    printf("perplexity %.4f: %.5f nats per token, %.5f bits per byte (%ld tokens, %zu bytes, %d stories)\n",
           exp(mean), mean, nats / log(2.0) / (double)bytes, stats->prompt_tokens, bytes, stats->stories);
    free(text.data);
}

// ---------------------------------------------------------------------------------------------------------
// Command line

static const char usage[] =
    "usage: run MODEL.bin [options]\n"
    "example: run out/model.bin -z data/tok4096.bin -i \"Once upon a time\"\n"
    "\n"
    "  -t, --temperature X   0 is greedy, 1 (default) the model's own probabilities\n"
    "  -p, --top-p X         sample from the likeliest tokens that together exceed X, default 0.9;\n"
    "                        0 or 1 is off\n"
    "  -k, --top-k N         sample from no more than the N likeliest tokens, default 0: off\n"
    "  -s, --seed N          random seed, default the time; 0 is the time, too\n"
    "  -n, --steps N         tokens to run for, prompt included, default 256; 0 is the whole context, and a\n"
    "                        chat's default\n"
    "  -i, --prompt TEXT     text to continue; - reads it from stdin (less one newline at its end)\n"
    "  -f, --file FILE       the same from a file\n"
    "  -z, --tokenizer FILE  default tokenizer.bin, else data/tokenizer.bin\n"
    "  -m, --mode MODE       generate (default) or chat\n"
    "  -y, --system TEXT     system prompt for chat\n"
    "  --template NAME       llama2 (default), or plain for a model trained with none\n"
    "  -b, --batch N         tell N stories, up to 32 at once, with the seeds -s, -s + 1, ...\n"
    "  -j, --threads N       at most, default as many as there are cores; one while that is faster\n"
    "  --draft N             guess up to N tokens ahead with a coarse copy of fp32 weights, which tells the same\n"
    "                        story sooner where a model is larger than the caches: default 15 there, else 0: off\n"
    "  -h, --help            this text\n"
    "  --version             the version, and the instruction sets this program can use here\n"
    "\n"
    "measuring and debugging:\n"
    "  --perplexity FILE     print how well the model foresees the stories in a file, separated by\n"
    "                        <|endoftext|>, and exit\n"
    "  --stats               print what was measured as JSON on stderr\n"
    "  --kernels NAME        use this instruction set\n"
    "  --tokens              print the prompt's token ids and exit\n"
    "  --logits              print all logits for each position of the prompt and exit\n"
    "\n"
    "A value follows its option, or a long one and '=': -t 0.5, --temperature 0.5, --temperature=0.5\n";

typedef struct {
    const char *model, *prompt, *file, *tokenizer, *system, *perplexity;
    const Kernels *kernels;
    float temperature, topp;
    uint64_t seed;
    int steps, topk, stories, threads, draft;
    bool chat, plain, tokens, logits, stats;
} Options;

#define SEE_HELP "; see: run --help"

static float parse_float(const char *flag, const char *text, float max, const char *expected) {
    char *end;
    float value = strtof(text, &end);
    bool number = *text > ' ' && *end == '\0' && isfinite(value);
    if (!number || value < 0 || value > max) die(flag, "expected %s, got '%s'" SEE_HELP, expected, text);
    return value;
}

static uint64_t parse_integer(const char *flag, const char *text, uint64_t max) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0' || errno || value > max) {  // strtoull would take " -1"
        die(flag, "expected a whole number from 0 to %llu, got '%s'" SEE_HELP, (unsigned long long)max, text);
    }
    return value;
}

static void set_option(Options *o, char key, const char *flag, const char *value) {
    switch (key) {
        case 't': o->temperature = parse_float(flag, value, FLT_MAX, "a number of at least 0"); break;
        case 'p': o->topp = parse_float(flag, value, 1.0f, "a number from 0 to 1"); break;
        case 's': o->seed = parse_integer(flag, value, UINT64_MAX); break;
        case 'n': o->steps = (int)parse_integer(flag, value, INT_MAX); break;
        case 'i': o->prompt = value; break;
        case 'f': o->file = value; break;
        case 'k': o->topk = (int)parse_integer(flag, value, INT_MAX); break;
        case 'b': o->stories = (int)parse_integer(flag, value, 1 << 20); break;
        case 'D': o->draft = (int)parse_integer(flag, value, MAX_DRAFT); break;
        case 'j': o->threads = (int)parse_integer(flag, value, 1024); break;
        case 'z': o->tokenizer = value; break;
        case 'y': o->system = value; break;
        case 'm':
            o->chat = !strcmp(value, "chat");
            if (!o->chat && strcmp(value, "generate")) die(flag, "expected generate or chat, got '%s'" SEE_HELP, value);
            break;
        case 'M':
            o->plain = !strcmp(value, "plain");
            if (!o->plain && strcmp(value, "llama2")) die(flag, "expected llama2 or plain, got '%s'" SEE_HELP, value);
            break;
        case 'P': o->perplexity = value; break;
        case 'T': o->tokens = true; break;
        case 'L': o->logits = true; break;
        case 'S': o->stats = true; break;
        case 'K': o->kernels = find_kernels(value); break;
        case 'V':
            printf("run 1.0, kernels:");
            for (size_t i = 0; i < N_KERNELS; i++) {
                if (usable(all_kernels[i])) printf(" %s", all_kernels[i]->name);
            }
            putchar('\n');
            flush_stdout();
            exit(EXIT_SUCCESS);
        case 'h':
            fputs(usage, stdout);
            flush_stdout();
            exit(EXIT_SUCCESS);
    }
}

static Options parse_options(int argc, char **argv) {
    static const struct { char key; bool has_value; const char *name; } known[] = {
        {'t', true, "--temperature"}, {'p', true, "--top-p"}, {'s', true, "--seed"}, {'n', true, "--steps"},
        {'i', true, "--prompt"}, {'z', true, "--tokenizer"}, {'m', true, "--mode"}, {'y', true, "--system"},
        {'f', true, "--file"}, {'k', true, "--top-k"}, {'b', true, "--batch"}, {'j', true, "--threads"},
        {'h', false, "--help"}, {'T', false, "--tokens"}, {'L', false, "--logits"}, {'S', false, "--stats"},
        {'K', true, "--kernels"}, {'V', false, "--version"}, {'M', true, "--template"},
        {'P', true, "--perplexity"}, {'D', true, "--draft"},
    };
    const size_t n_known = sizeof known / sizeof *known;
    Options o = {.temperature = 1.0f, .topp = 0.9f, .steps = -1, .stories = 1, .draft = -1};
    for (int a = 1; a < argc; a++) {
        const char *arg = argv[a];
        if (arg[0] != '-') {
            if (o.model) die(arg, "the model is already %s; a tokenizer follows -z, a prompt -i" SEE_HELP, o.model);
            o.model = arg;
            continue;
        }
        bool long_name = arg[1] == '-';
        const char *equals = long_name ? strchr(arg, '=') : NULL;
        size_t length = equals ? (size_t)(equals - arg) : strlen(arg), k = 0;
        for (; k < n_known; k++) {
            const char *name = known[k].name;
            if (long_name && strlen(name) == length && !strncmp(arg, name, length)) break;
            if (length == 2 && arg[1] == known[k].key && arg[1] >= 'a') break;  // capitals: long only
        }
        if (k == n_known) {
            char likely[256] = "";  // options that begin so
            for (size_t i = 0, n = 0; long_name && length > 3 && i < n_known; i++) {
                if (strncmp(arg, known[i].name, length)) continue;
                n += (size_t)snprintf(likely + n, sizeof likely - n, "%s%s", n ? " or " : "; did you mean ",
                                      known[i].name);
            }
            die(arg, "unknown option%s%s" SEE_HELP, likely, *likely ? "?" : "");
        }
        const char *value = equals ? equals + 1 : NULL;
        if (value && !known[k].has_value) die(arg, "this option takes no value" SEE_HELP);
        if (!value && known[k].has_value && !(value = argv[++a])) die(arg, "needs a value" SEE_HELP);
        set_option(&o, known[k].key, equals ? known[k].name : arg, value);
    }
    if (o.stories < 1) die("-b", "there must be at least one story" SEE_HELP);
    const char *other = o.chat ? "-m chat" : o.tokens ? "--tokens" : o.logits ? "--logits" : "--perplexity";
    if (o.chat + o.tokens + o.logits + !!o.perplexity > 1) {
        die(other, "-m chat, --tokens, --logits and --perplexity go one at a time; leave one of them out" SEE_HELP);
    }
    const bool story = !o.chat && !o.tokens && !o.logits && !o.perplexity;
    if (o.stories > 1 && !story) die("-b", "is for stories, not for %s; leave one of them out" SEE_HELP, other);
    if ((o.system || o.plain) && !o.chat) die(o.system ? "-y" : "--template", "is for a chat; add -m chat" SEE_HELP);
    if (o.perplexity && (o.steps >= 0 || o.prompt || o.file)) {
        die(o.steps >= 0 ? "-n" : o.prompt ? "-i" : "-f", "is for stories, not --perplexity; leave it out" SEE_HELP);
    }
    if (o.stats && (o.tokens || o.logits)) die("--stats", "measures nothing with %s; leave it out" SEE_HELP, other);
    if (o.steps < 0) o.steps = o.chat ? 0 : 256;
    if (o.prompt && o.file) die("-f", "the prompt is already given with -i; leave one of them out");
    if (!o.model) die("", "no model given; usage: run MODEL.bin [options], run --help lists them");
    return o;
}

// Where our scripts put the tokenizer of a model with so many tokens
static const char *likely_tokenizer(int vocab_size) {
    static char path[64] = "data/tokenizer.bin";
    if (vocab_size != 32000) snprintf(path, sizeof path, "data/tok%d.bin", vocab_size);
    return path;
}

static const char *default_tokenizer(int vocab_size) {
    static const char *const places[] = {"tokenizer.bin", "data/tokenizer.bin"};
    struct stat st;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        if (stat(places[i], &st) == 0) return places[i];
    }
    const char *likely = likely_tokenizer(vocab_size);
    die("tokenizer.bin", "not found, nor data/tokenizer.bin; name the model's own, perhaps -z %s, "
        "or make that: python tokenizer.py --tokenizer-model=%.*smodel", likely, (int)strlen(likely) - 3, likely);
}

static void warn_of_wrong_tokenizer(const Session *s) {
    const int vocab_size = s->model.config.vocab_size;
    if (s->tokenizer.size == vocab_size) return;
    warn("warning", "%s holds %d tokens, but the model's vocabulary has %d: try -z %s", s->tokenizer.file.path,
         s->tokenizer.size, vocab_size, likely_tokenizer(vocab_size));
}

// The text given with -i or -f; its data is NULL when there is none.
static Text read_prompt(const Options *o) {
    Text t = {0};
    const bool from_stdin = o->prompt && !strcmp(o->prompt, "-");
    if (o->prompt && !from_stdin) {
        text_append_string(&t, o->prompt);
    } else if (o->file || (from_stdin && !o->chat)) {  // a chat reads stdin anyway
        t = read_text(o->file ? o->file : "-");
        if (t.len > 0 && t.data[t.len - 1] == '\n') t.len--;  // echo's, or the editor's
    }
    return t;
}

#ifndef _WIN32
// A file that is mapped into memory can be cut short, or its disk fail, while we read it.
static void lost_file(int number) {
    static const char message[] = "run: a file was cut short while in use, or cannot be read; put a whole one there\n";
    (void)number;
    const ssize_t written = write(STDERR_FILENO, message, sizeof message - 1);
    (void)written;  // there is nobody else to tell
    _exit(EXIT_FAILURE);
}
#endif

int main(int argc, char **argv) {
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#else
    signal(SIGPIPE, SIG_IGN);  // a reader that went away is a write error, reported as such
    signal(SIGBUS, lost_file);
#endif
    const double start = now();
    Options o = parse_options(argc, argv);
    Session s = {.flush_each = isatty(fileno(stdout)), .plain = o.plain, .draft.max_tokens = o.draft};
    Pool pool;
    load_model(&s.model, o.model, o.kernels ? o.kernels : best_kernels());
    start_pool(&pool, o.threads ? o.threads : physical_cores(), o.threads == 0);
    s.model.pool = &pool;
    if (!o.tokens) pack_model(&s.model);
    load_tokenizer(&s.tokenizer, o.tokenizer ? o.tokenizer : default_tokenizer(s.model.config.vocab_size));
    warn_of_wrong_tokenizer(&s);
    const int vocab_size = s.model.config.vocab_size, seq_len = s.model.config.seq_len;
    s.limit = o.steps > 0 && o.steps < seq_len ? o.steps : seq_len;
    s.sampler = (Sampler){.n = vocab_size, .temperature = o.temperature, .topp = o.topp, .topk = o.topk,
                          .kernels = s.model.kernels};
    s.candidates = allocate_unset(vocab_size, 2 * (size_t)pool.size, sizeof(Candidate), "the sampler");
    const uint64_t seed = o.seed ? o.seed : (uint64_t)time(NULL);  // xorshift never leaves 0
    Stats stats = {.load = now() - start};
    Text prompt = read_prompt(&o);
    if (o.perplexity) print_perplexity(&s, o.perplexity, &stats);
    else if (o.chat) chat(&s, &prompt, o.system, seed, &stats);
    else if (o.tokens) print_tokens(&s, &prompt);
    else if (o.logits) print_logits(&s, &prompt);
    else generate(&s, &prompt, o.stories, seed, &stats);
    flush_stdout();
    if (o.stats) print_stats(&s, &stats);
    free(prompt.data);
    free(s.candidates);
    free_draft(&s.draft);
    free_tokenizer(&s.tokenizer);
    free_model(&s.model);
    stop_pool(&pool);
    return 0;
}

#else  // ISA
// ---------------------------------------------------------------------------------------------------------
// Kernels, read once for each instruction set: ISA says which.

#define F CONCAT(F, ISA)
#define I CONCAT(I, ISA)
#define Q CONCAT(Q, ISA)
#define KERNEL static CONCAT(TARGET, ISA)
#define HELPER INLINE CONCAT(TARGET, ISA)

// A whole vector, or the n floats that are left
HELPER F V(load_up_to)(const float *p, int n) { return n >= LANES ? V(load)(p) : V(load_n)(p, n); }

HELPER void V(store_up_to)(float *p, F x, int n) {
    if (n >= LANES) V(store)(p, x);
    else V(store_n)(p, x, n);
}

// e^x for x <= 0 or so, within 2 units in the last place: 2^n times a polynomial (coefficients: Cephes, expf)
HELPER F V(exponential)(F x) {
    x = V(max)(V(set1)(-87.0f), x);  // in this order a NaN stays one
    F half = V(sign)(V(set1)(0.5f), x);
    F n = V(trunc)(V(fma)(x, V(set1)(1.44269504f), half));
    F r = V(fma)(n, V(set1)(-0.693359375f), x);
    r = V(fma)(n, V(set1)(2.12194440e-4f), r);
    F p = V(set1)(1.9875691500e-4f);
    p = V(fma)(p, r, V(set1)(1.3981999507e-3f));
    p = V(fma)(p, r, V(set1)(8.3334519073e-3f));
    p = V(fma)(p, r, V(set1)(4.1665795894e-2f));
    p = V(fma)(p, r, V(set1)(1.6666665459e-1f));
    p = V(fma)(p, r, V(set1)(5.0000001201e-1f));
    p = V(fma)(p, V(mul)(r, r), V(add)(r, V(set1)(1.0f)));
    return V(mul)(p, V(pow2)(n));
}

// Turns n numbers into e^(x - the largest) and returns their sum; zeros behind, up to a whole number of vectors.
HELPER float V(exp_and_sum)(float *x, int n) {
    for (int i = n; i % LANES; i++) x[i] = -INFINITY;
    F top = V(load)(x);
    for (int i = LANES; i < n; i += LANES) top = V(max)(top, V(load)(x + i));
    F max = V(set1)(V(reduce_max)(top)), sum = V(set1)(0.0f);  // keeps the powers in range
    for (int i = 0; i < n; i += LANES) {
        F e = V(exponential)(V(sub)(V(load)(x + i), max));
        V(store)(x + i, e);
        sum = V(add)(sum, i + LANES <= n ? e : V(load_n)(x + i, n - i));
    }
    for (int i = n; i % LANES; i++) x[i] = 0.0f;
    return V(sum)(sum);
}

// Turns n scores into probabilities. There is room for a whole number of vectors.
KERNEL void V(softmax)(float *x, int n) {
    F scale = V(set1)(1.0f / V(exp_and_sum)(x, n));
    for (int i = 0; i < n; i += LANES) V(store)(x + i, V(mul)(V(load)(x + i), scale));
}

KERNEL void V(rmsnorm)(float *out, const float *x, const float *weight, int n, float eps) {
    F squares = V(set1)(0.0f);
    for (int i = 0; i < n; i += LANES) {
        F a = V(load_up_to)(x + i, n - i);
        squares = V(fma)(a, a, squares);
    }
    F scale = V(set1)(1.0f / sqrtf(V(sum)(squares) / (float)n + eps));
    for (int i = 0; i < n; i += LANES) {
        F a = V(mul)(scale, V(load_up_to)(x + i, n - i));
        V(store_up_to)(out + i, V(mul)(V(load_up_to)(weight + i, n - i), a), n - i);
    }
}

// Rounds each group of a row's floats to int8, symmetric, half away from zero.
KERNEL void V(quantize)(Activation *x, int row, int cols, int group, int bits) {
    const F zero = V(set1)(0.0f);
    const int offset = bits == 4 ? 8 : V(WEIGHT_XOR);
    for (int g = 0; g * group < cols; g++) {
        const float *v = x->f + (size_t)row * x->width + (size_t)g * (size_t)group;
        const size_t at = (size_t)row * x->groups + (size_t)g;
        int8_t *q = x->q + at * x->units * 4;
        const int n = imin(group, cols - g * group);
        F top = zero, check = zero;
        int i = 0;
        for (; i < n; i += LANES) {
            F a = V(load_up_to)(v + i, n - i);
            top = V(max)(top, V(abs)(a));
            check = V(fma)(a, zero, check);  // 0 * infinity is not a number
        }
        const bool finite = V(sum)(check) == 0.0f;
        const float scale = V(reduce_max)(top) / 127.0f;
        // all zero, or so small that the scale itself is badly rounded
        const bool tiny = !finite || scale < FLT_MIN;
        const F divisor = V(set1)(tiny ? INFINITY : scale), half = V(set1)(LOWER_HALF);
        int32_t sum = 0;
        for (i = 0; finite && i + LANES <= n; i += LANES) {
            F exact = V(div)(V(load)(v + i), divisor);
            V(store_int8)(q + i, V(add)(exact, V(sign)(half, exact)));
        }
        for (; i < n; i++) {
            float exact = tiny ? 0.0f : v[i] / scale;
            q[i] = (int8_t)(exact + copysignf(LOWER_HALF, exact));
        }
        memset(q + n, 0, x->units * 4 - (size_t)n);
        for (i = 0; i < n; i++) sum += q[i];
        x->bias[at] = -offset * sum;
        x->scale[at] = finite ? scale : NAN;  // lets a NaN reach the logits, where it is reported
    }
}

// R rows of fp32 weights as the file has them, from `first` on and `apart` rows apart, times C rows of x
HELPER void V(tile_f32)(const int R, const int C, const Tensor *t, size_t first, size_t apart, const Activation *input,
                        int row, float *out, size_t ldo) {
    const int cols = t->cols;
    const size_t next = apart * (size_t)cols, ldx = input->width;
    const float *w = t->f + first * (size_t)cols, *x = input->f + (size_t)row * ldx;
    F sums[4][4], a[4];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sums[r][c] = V(set1)(0.0f);
    int i = 0;
    for (; i + LANES <= cols; i += LANES) {
        UNROLL for (int r = 0; r < R; r++) {
            a[r] = V(load)(w + (size_t)r * next + i);
            if (C > 2) PREFETCH_L2(w + (size_t)r * next + (size_t)(cols + i));  // the next row
        }
        UNROLL for (int c = 0; c < C; c++) {
            F b = V(load)(x + (size_t)c * ldx + i);
            UNROLL for (int r = 0; r < R; r++) sums[r][c] = V(fma)(a[r], b, sums[r][c]);
        }
    }
    if (i < cols) {
        UNROLL for (int r = 0; r < R; r++) a[r] = V(load_n)(w + (size_t)r * next + i, cols - i);
        UNROLL for (int c = 0; c < C; c++) {
            F b = V(load)(x + (size_t)c * ldx + i);  // x is padded with zeros
            UNROLL for (int r = 0; r < R; r++) sums[r][c] = V(fma)(a[r], b, sums[r][c]);
        }
    }
    UNROLL for (int c = 0; c < C; c++) {
        float four[4];
        if (R == 4) V(sum4)(four, sums[0][c], sums[1][c], sums[2][c], sums[3][c]);
        else UNROLL for (int r = 0; r < R; r++) four[r] = V(sum)(sums[r][c]);
        UNROLL for (int r = 0; r < R; r++) out[(size_t)(row + c) * ldo + first + (size_t)r * apart] = four[r];
    }
}

// Adds to the k-th sums of a tile the products of a vector of each of R bands, `next` bytes apart, and C rows of x
HELPER void V(add_products)(const int R, const int C, const int k, const int bits, const unsigned char *v, size_t next,
                            size_t ahead, const int8_t *q, size_t x_bytes, I dots[4][8][4]) {
    UNROLL for (int r = 0; r < R; r++, v += next) {
        Q a = V(bytes)(v);
        if (C > 1) PREFETCH_L2(v + ahead);  // the next band, while rows of x keep this one
        UNROLL for (int c = 0; c < C; c++) {
            I *dot = &dots[r][c][k];
            const int8_t *p = q + (size_t)c * x_bytes;
            if (bits == 8) *dot = V(dot8)(*dot, a, p);
            else *dot = V(dot4)(V(dot4)(*dot, V(low)(a), p), V(high)(a), p + 4);
        }
    }
}

// Rows of R bands of int8 or 4-bit weights, `apart` bands apart, times C rows of x. The whole numbers of a group
// are summed exactly, in S sums (more than one where there would be too few to keep the machine busy), then
// scaled: the result is the same to the last bit for every instruction set. U is how many vectors a group has, or 0
// where the compiler need not know.
HELPER void V(tile_int)(const int R, const int C, const int S, const size_t U, const int bits, const Tensor *w,
                        size_t band, size_t apart, const Activation *x, int row, float *out, size_t ldo) {
    const size_t units = w->units, vectors = U ? U : bits == 4 ? GROUP4 / 8 : units;
    const size_t scale_bytes = bits == 4 ? 2 : 4, x_bytes = x->groups * units * 4, step = bits == 4 ? 8 : 4;
    const size_t band_bytes = w->groups * vectors * BAND, next = apart * band_bytes;
    const unsigned char *values = w->values + band * band_bytes;
    const unsigned char *scales = w->scales + band * w->groups * LANES * scale_bytes;
    const int8_t *q = x->q + (size_t)row * x_bytes;
    F sums[4][8];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sums[r][c] = V(set1)(0.0f);
    for (size_t g = 0; g < w->groups; g++, values += vectors * BAND, q += units * 4) {
        const size_t at = (size_t)row * x->groups + g;
        I dots[4][8][4];
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) UNROLL for (int k = 0; k < S; k++) {
            dots[r][c][k] = V(seti)(k || bits == 4 || !V(WEIGHT_XOR) ? 0 : x->bias[at + (size_t)c * x->groups]);
        }
        UNROLL for (size_t u = 0; u < U; u++) {
            V(add_products)(R, C, 0, bits, values + u * BAND, next, band_bytes, q + u * step, x_bytes, dots);
        }
        for (size_t u = U; u < vectors; u += (size_t)S) UNROLL for (int k = 0; k < S; k++) {
            const size_t v = u + (size_t)k;
            V(add_products)(R, C, k, bits, values + v * BAND, next, band_bytes, q + v * step, x_bytes, dots);
        }
        UNROLL for (int r = 0; r < R; r++) {
            const unsigned char *p = scales + ((size_t)r * apart * w->groups + g) * LANES * scale_bytes;
            F scale = bits == 4 ? V(halves)(p) : V(load)((const float *)(const void *)p);
            UNROLL for (int c = 0; c < C; c++) {
                I dot = bits == 4 ? V(seti)(x->bias[at + (size_t)c * x->groups]) : dots[r][c][0];
                UNROLL for (int k = bits == 8; k < S; k++) {
                    dot = V(addi)(dot, bits == 4 ? V(total4)(dots[r][c][k]) : dots[r][c][k]);
                }
                F part = V(mul)(V(mul)(V(float)(dot), scale), V(set1)(x->scale[at + (size_t)c * x->groups]));
                sums[r][c] = V(add)(sums[r][c], part);
            }
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) {
        const size_t at = (band + (size_t)r * apart) * LANES;
        V(store_up_to)(out + (size_t)(row + c) * ldo + at, sums[r][c], w->rows - (int)at);
    }
}

// The same of fp32 weights: the bands from `band` on are at values
HELPER void V(tile_bands)(const int R, const int C, const float *values, const Tensor *w, size_t band, size_t apart,
                          const Activation *x, int row, float *out, size_t ldo) {
    const size_t cols = (size_t)w->cols;
    const float *in = x->f + (size_t)row * x->width;
    F sums[4][8];
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) sums[r][c] = V(set1)(0.0f);
    for (size_t i = 0; i < cols; i++) {
        F a[4];
        UNROLL for (int r = 0; r < R; r++) {
            const float *at = values + ((size_t)r * apart * cols + i) * LANES;
            a[r] = V(load)(at);
            V(keep)(&a[r]);
            // rows of x keep a band of the weights' own for so long that the next one can come meanwhile
            if (C > 1 && (R == 1 || C < TILE)) PREFETCH_L2(at + cols * LANES);
        }
        UNROLL for (int c = 0; c < C; c++) {
            F b = V(set1)(in[(size_t)c * x->width + i]);
            UNROLL for (int r = 0; r < R; r++) sums[r][c] = V(fma)(a[r], b, sums[r][c]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int c = 0; c < C; c++) {
        const size_t at = (band + (size_t)r * apart) * LANES;
        V(store_up_to)(out + (size_t)(row + c) * ldo + at, sums[r][c], w->rows - (int)at);
    }
}

// Tiles in functions of their own: among all the others, in matmul, compilers run out of registers.
KERNEL NOINLINE void V(six_rows)(const float *values, const Tensor *w, size_t band, const Activation *x, int row,
                                 float *out, size_t ldo) {
    V(tile_bands)(1, 6, values, w, band, 1, x, row, out, ldo);
}

KERNEL NOINLINE void V(int8_rows)(const Tensor *w, size_t band, const Activation *x, int row, int n, float *out,
                                  size_t ldo) {
    if (w->units == 8) for (; row < n; row += TILE) V(tile_int)(1, TILE, 1, 8, 8, w, band, 1, x, row, out, ldo);
    if (w->units == 16) for (; row < n; row += TILE) V(tile_int)(1, TILE, 1, 16, 8, w, band, 1, x, row, out, ldo);
    for (; row < n; row += TILE) V(tile_int)(1, TILE, 1, 0, 8, w, band, 1, x, row, out, ldo);
}

KERNEL NOINLINE void V(int4_rows)(const Tensor *w, size_t band, const Activation *x, int row, int n, float *out,
                                  size_t ldo) {
    for (; row < n; row += TILE) V(tile_int)(1, TILE, 1, GROUP4 / 8, 4, w, band, 1, x, row, out, ldo);
}

// fp32 weights by rows times many rows of x: they are turned into bands, two at a time, which pays.
KERNEL void V(matmul_many)(const Tensor *w, const Activation *x, int n, float *out, size_t ldo, size_t band,
                           size_t bands, float *scratch) {
    const size_t cols = (size_t)w->cols;
    for (size_t end = band + bands, take; band < end; band += take) {
        take = end - band < 2 ? 1 : 2;
        for (size_t r = 0; r < take; r++) {
            const size_t row = (band + r) * LANES, left = (size_t)w->rows - row;
            const float *from = w->f + row * cols;
            float *to = scratch + r * LANES * cols;
            for (size_t i = 0; i < cols; i++, to += LANES) {
                for (size_t j = 0; j < LANES; j++) to[j] = j < left ? from[j * cols + i] : 0.0f;
            }
        }
        int b = 0;
        for (int step; TILE_TWO == 2 && b < n; b += step) {  // 6 rows take 12 of AVX2's 16 registers, 24 of NEON's 32
            step = n - b < 2 ? 1 : n - b < 6 ? 2 : 6;
            for (size_t r = 0; r < take; r++) {
                const float *values = scratch + r * LANES * cols;
                if (step == 6) V(six_rows)(values, w, band + r, x, b, out, ldo);
                if (step == 2) V(tile_bands)(1, 2, values, w, band + r, 1, x, b, out, ldo);
                if (step == 1) V(tile_bands)(1, 1, values, w, band + r, 1, x, b, out, ldo);
            }
        }
        for (; TILE_TWO != 2 && take == 2 && b + TILE_TWO <= n; b += TILE_TWO) {
            V(tile_bands)(2, TILE_TWO, scratch, w, band, 1, x, b, out, ldo);
        }
        for (; TILE_TWO != 2 && take == 2 && b < n; b++) V(tile_bands)(2, 1, scratch, w, band, 1, x, b, out, ldo);
        for (; TILE_TWO != 2 && b < n; b++) V(tile_bands)(1, 1, scratch, w, band, 1, x, b, out, ldo);
    }
}

HELPER void V(tile)(const int R, const int C, const Tensor *w, size_t band, size_t apart, const Activation *x,
                    int row, float *out, size_t ldo) {
    const bool telling = TILE > 1 && R == 4 && C == 1;  // most of the time goes here, with groups of 32 or 64
    const float *f = (const float *)(const void *)w->values + band * (size_t)w->cols * LANES;
    if (w->bits == 32) V(tile_bands)(R, C, f, w, band, apart, x, row, out, ldo);
    else if (w->bits == 4) V(tile_int)(R, C, R * C == 1 ? 4 : 1, 0, 4, w, band, apart, x, row, out, ldo);
    else if (R * C == 1 && w->units % 4 == 0) V(tile_int)(R, C, 4, 0, 8, w, band, apart, x, row, out, ldo);
    else if (telling && w->units == 8) V(tile_int)(R, C, 1, 8, 8, w, band, apart, x, row, out, ldo);
    else if (telling && w->units == 16) V(tile_int)(R, C, 1, 16, 8, w, band, apart, x, row, out, ldo);
    else V(tile_int)(R, C, 1, 0, 8, w, band, apart, x, row, out, ldo);
}

// R bands, 4 or 1, times the rows of x from `row` to n, fewer than TILE
HELPER void V(tiles)(const int R, const Tensor *w, size_t band, size_t apart, const Activation *x, int row, int n,
                     float *out, size_t ldo) {
    for (; TILE_TWO > 4 && row + 4 <= n; row += 4) {  // two bands at a time: there are 32 registers
        V(tile)(R == 4 ? 2 : 1, 4, w, band, apart, x, row, out, ldo);
        if (R == 4) V(tile)(2, 4, w, band + 2 * apart, apart, x, row, out, ldo);
    }
    for (; TILE_TWO > 2 && row + 2 <= n; row += 2) V(tile)(R, 2, w, band, apart, x, row, out, ldo);
    for (; TILE > TILE_TWO && row + 2 <= n; row += 2) {
        for (size_t r = 0; r < (size_t)R; r++) V(tile)(1, 2, w, band + r * apart, apart, x, row, out, ldo);
    }
    for (; row < n; row++) V(tile)(R, 1, w, band, apart, x, row, out, ldo);
}

// Rows from..to of w (rows, cols) times the n rows of x (n, cols): out[b * ldo + row]. All the model's weights
// are read here. from and to are multiples of LANES, but for the last row. Four bands, or rows where the file's
// are used, are taken at once, a quarter of all apart: memory gives four streams faster than one.
KERNEL void V(matmul)(const Tensor *w, const Activation *x, int n, float *out, size_t ldo, int from, int to,
                      float *scratch) {
    const size_t first = (size_t)from / LANES, bands = round_up((size_t)to, LANES) / LANES - first;
    int b = 0;
    if (!w->values && n >= PACK_ROWS) {
        V(matmul_many)(w, x, n, out, ldo, first, bands, scratch);
        return;
    }
    if (!w->values) {
        const size_t quarter = (size_t)(to - from) / 4;
        for (size_t r = (size_t)from; r < (size_t)from + quarter; r++) {
            for (b = 0; b + TILE_F32 <= n; b += TILE_F32) V(tile_f32)(4, TILE_F32, w, r, quarter, x, b, out, ldo);
            for (; TILE_F32 > 2 && b + 2 <= n; b += 2) V(tile_f32)(4, 2, w, r, quarter, x, b, out, ldo);
            for (; b < n; b++) V(tile_f32)(4, 1, w, r, quarter, x, b, out, ldo);
        }
        for (size_t r = (size_t)from + 4 * quarter; r < (size_t)to; r++) {
            for (b = 0; b < n; b++) V(tile_f32)(1, 1, w, r, 0, x, b, out, ldo);
        }
        return;
    }
    const size_t quarter = bands / 4;
    for (size_t i = first; TILE > 1 && i < first + bands; i++) {
        for (b = 0; TILE_TWO == 2 && w->bits == 32 && b + 6 <= n && n - b != 8; b += 6) {  // 8 are twice 4
            const float *values = (const float *)(const void *)w->values + i * (size_t)w->cols * LANES;
            V(six_rows)(values, w, i, x, b, out, ldo);
        }
        const int end = b + (n - b) / TILE * TILE;
        if (w->bits == 8) V(int8_rows)(w, i, x, b, end, out, ldo);
        else if (w->bits == 4) V(int4_rows)(w, i, x, b, end, out, ldo);
        else for (; b < end; b += TILE) V(tile)(1, TILE, w, i, 1, x, b, out, ldo);
        b = end;
    }
    if (b == n) return;
    for (size_t i = first; i < first + quarter; i++) V(tiles)(4, w, i, quarter, x, b, n, out, ldo);
    for (size_t i = first + 4 * quarter; i < first + bands; i++) V(tiles)(1, w, i, 1, x, b, n, out, ldo);
}

// gate[i] = silu(gate[i]) * up[i], the middle of SwiGLU
KERNEL void V(swiglu)(float *gate, const float *up, int n) {
    const F one = V(set1)(1.0f), zero = V(set1)(0.0f);
    for (int i = 0; i < n; i += LANES) {
        F g = V(load_up_to)(gate + i, n - i), u = V(load_up_to)(up + i, n - i);
        // 1 / (1 + e^-g), written so that nothing overflows: with e = e^-|g| it is 1 / (1 + e) or e / (1 + e)
        F e = V(exponential)(V(sub)(zero, V(abs)(g)));
        F larger = V(div)(one, V(add)(one, e));
        F positive = V(max)(g, zero), negative = V(sub)(g, positive);
        F silu = V(add)(V(mul)(positive, larger), V(mul)(negative, V(mul)(e, larger)));
        V(store_up_to)(gate + i, V(mul)(silu, u), n - i);
    }
}

// Puts a head's key or value of one position into its place, every LANES-th number from `at` on.
KERNEL void V(store_kv)(unsigned char *cache, size_t at, const float *v, int size, size_t kv_bytes) {
    const F zero = V(set1)(0.0f), least = V(set1)(-65504.0f);  // what a half float holds; a NaN stays one
    for (int i = 0; i < size; i += LANES) {
        const int n = imin(LANES, size - i);
        uint16_t half[LANES];
        if (kv_bytes == 2) {
            F x = V(load_up_to)(v + i, n);
            V(store_halves)(half, V(sub)(zero, V(max)(least, V(sub)(zero, V(max)(least, x)))));
        }
        for (int j = 0; j < n; j++, at += LANES) {
            if (kv_bytes == 2) memcpy(cache + at * 2, &half[j], 2);
            else memcpy(cache + at * sizeof *v, &v[i + j], sizeof *v);
        }
    }
}

// LANES positions' numbers, of B bytes each
HELPER F V(load_kv)(const size_t B, const unsigned char *from, size_t i) {
    return B == 2 ? V(halves)(from + i * B) : V(load)((const float *)(const void *)from + i);
}

// Scores of D vectors of positions from t on: each query times their keys
HELPER void V(score)(const int N, const int D, const size_t B, const Query *queries, const unsigned char *keys,
                     const unsigned char *values, size_t room, int size, int t, float *scores) {
    F sum[4][MAX_QUERIES];
    UNROLL for (int d = 0; d < D; d++) UNROLL for (int j = 0; j < N; j++) sum[d][j] = V(set1)(0.0f);
    for (int i = 0; i < size; i++) UNROLL for (int d = 0; d < D; d++) {
        const size_t at = (size_t)(t + d * LANES) * size + (size_t)i * LANES;
        if (N == 1) PREFETCH(values + at * B);
        F k = V(load_kv)(B, keys, at);
        UNROLL for (int j = 0; j < N; j++) sum[d][j] = V(fma)(V(set1)(queries[j].q[i]), k, sum[d][j]);
    }
    UNROLL for (int d = 0; d < D; d++) UNROLL for (int j = 0; j < N; j++) {
        V(store)(scores + (size_t)j * room + t + d * LANES, sum[d][j]);
    }
}

// Dimensions i to i + E (1, 2, or a multiple of 4) of the values, mixed by the scores
HELPER void V(mix)(const int N, const int E, const size_t B, const Query *queries, const float *inv_sum,
                   const unsigned char *values, size_t room, int size, int blocks, int i, const float *scores) {
    F sum[16][MAX_QUERIES];
    UNROLL for (int e = 0; e < E; e++) UNROLL for (int j = 0; j < N; j++) sum[e][j] = V(set1)(0.0f);
    for (int t = 0; t < blocks; t += LANES) {
        F p[MAX_QUERIES];
        UNROLL for (int j = 0; j < N; j++) p[j] = V(load)(scores + (size_t)j * room + t);
        UNROLL for (int e = 0; e < E; e++) {
            F v = V(load_kv)(B, values, (size_t)t * size + (size_t)(i + e) * LANES);
            UNROLL for (int j = 0; j < N; j++) sum[e][j] = V(fma)(p[j], v, sum[e][j]);
        }
    }
    UNROLL for (int j = 0; j < N; j++) {
        float *out = queries[j].out + i;
        if (E < 4) UNROLL for (int e = 0; e < E; e++) out[e] = V(sum)(sum[e][j]);
        else UNROLL for (int e = 0; e < E; e += 4) {
            V(sum4)(out + e, sum[e][j], sum[e + 1][j], sum[e + 2][j], sum[e + 3][j]);
        }
        for (int e = 0; e < E; e++) out[e] *= inv_sum[j];
    }
}

// N query heads over the positions of one key/value head: keys and values (blocks, size, LANES). D vectors of
// positions, then E of dimensions, are worked on at once. scores (N, room)
HELPER void V(attend_n)(const int N, const int D, const int E, const size_t B, const Query *queries,
                        const unsigned char *keys, const unsigned char *values, size_t room, int size, float *scores) {
    int last = 0;
    for (int j = 0; j < N; j++) last = imax(last, queries[j].pos);
    const int blocks = (int)round_up((size_t)last + 1, LANES);
    int t = 0;
    for (; t + D * LANES <= blocks; t += D * LANES) V(score)(N, D, B, queries, keys, values, room, size, t, scores);
    for (; t < blocks; t += LANES) V(score)(N, 1, B, queries, keys, values, room, size, t, scores);
    float inv_sum[MAX_QUERIES];
    for (int j = 0; j < N; j++) {
        float *row = scores + (size_t)j * room;
        inv_sum[j] = 1.0f / V(exp_and_sum)(row, queries[j].pos + 1);
        for (t = (int)round_up((size_t)queries[j].pos + 1, LANES); t < blocks; t++) row[t] = 0.0f;
    }
    int i = 0;
    for (; i + E <= size; i += E) V(mix)(N, E, B, queries, inv_sum, values, room, size, blocks, i, scores);
    for (; E > 4 && i + 4 <= size; i += 4) V(mix)(N, 4, B, queries, inv_sum, values, room, size, blocks, i, scores);
    for (; i < size; i++) V(mix)(N, 1, B, queries, inv_sum, values, room, size, blocks, i, scores);
}

#define ATTEND_OF(n, d, e, b) V(attend_n)(n, d, e, b, queries, keys, values, room, size, scores)
#define ATTEND(n, d, e) kv_bytes == 2 ? ATTEND_OF(n, d, e, 2) : ATTEND_OF(n, d, e, 4)
KERNEL void V(attend)(int n, const Query *queries, const unsigned char *keys, const unsigned char *values,
                      size_t kv_bytes, size_t room, int size, float *scores) {
    for (int take; n > 0; n -= take, queries += take) {
        take = TILE == 1 || n == 1 ? 1 : n < 4 ? 2 : 4;
        if (TILE > 4) {  // there are registers for 16 sums, else for 4
            if (take == 4) ATTEND(4, 2, 4);
            if (take == 2) ATTEND(2, 4, 8);
            if (take == 1) ATTEND(1, 1, 16);
        } else {
            if (take == 4) ATTEND(4, 1, 1);
            if (take == 2) ATTEND(2, 2, 2);
            if (take == 1) ATTEND(1, 1, 4);
        }
    }
}
#undef ATTEND
#undef ATTEND_OF

// Whether all n are finite
KERNEL bool V(finite)(const float *x, int n) {
    F zero = V(set1)(0.0f), sum = zero;  // 0 * infinity is not a number
    for (int i = 0; i < n; i += LANES) sum = V(fma)(V(load_up_to)(x + i, n - i), zero, sum);
    return V(sum)(sum) == 0.0f;
}

#define NAME_(isa) #isa
#define NAME(isa) NAME_(isa)
static const Kernels V(kernels) = {
    NAME(ISA), V(softmax), V(rmsnorm), V(quantize), V(matmul), V(swiglu), V(store_kv), V(attend), V(finite),
    V(WEIGHT_XOR),
};

#undef NAME
#undef NAME_
#undef F
#undef Q
#undef KERNEL
#undef HELPER
#undef I
#undef TILE
#undef TILE_TWO
#undef TILE_F32
#undef ISA
#endif  // ISA
