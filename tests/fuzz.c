/*
 * fuzz.c - run.c under a fuzzer: bytes that were never meant as a model, tokenizer, prompt or command line.
 *
 *   make fuzz                 # clang's libFuzzer: each target for 10 minutes
 *   cc -std=c11 -g -DSMALL -fsanitize=address,undefined -I. -o replay tests/fuzz.c -lm -lpthread
 *   ./replay model FILE...    # inputs of one target again, with any compiler
 *
 * run.c is included whole, and what it asks of the system is answered here. Files are bytes in memory, mapped
 * as blocks of exactly their size, so that a read beyond the end is seen; exit() comes back to the fuzzer,
 * which ends what the program left. An input fails where a sanitizer says so, a run that succeeds leaks, an
 * error is not a line on stderr, or ids are not those of the slow, plain encoder below.
 *
 * Not for: the machine's real files, running out of memory in the middle, the numbers a model computes.
 */
#define _GNU_SOURCE
#define _FILE_OFFSET_BITS 64

#include <ctype.h>
#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

// ---------------------------------------------------------------------------------------------------------
// The system, as run.c sees it

enum { MAX_BLOCKS = 4096, MAX_BLOCK = 256 << 20, MAX_FILES = 9, MAX_THREADS = 2 };

typedef struct {
    const char *name;
    const void *data;
    size_t size;
    mode_t mode;
} Entry;

static Entry entries[MAX_FILES + 1];  // the directory; behind the last one is one without a name
static const Entry *opened;           // the latest
static FILE *streams[MAX_FILES];      // that are open
static FILE *input, *output, *errors;
static char errors_text[16384];
static void *blocks[MAX_BLOCKS];      // that are allocated
static int n_blocks;
static pthread_mutex_t blocks_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_t threads[MAX_THREADS];
static int n_threads;
static jmp_buf back;

static void fail(const char *what) {
    fprintf(stderr, "fuzz: %s\n%s", what, errors_text);
    abort();
}

static void *keep(void *p) {
    pthread_mutex_lock(&blocks_mutex);
    if (n_blocks == MAX_BLOCKS) fail("too many blocks of memory");
    if (p) blocks[n_blocks++] = p;
    pthread_mutex_unlock(&blocks_mutex);
    return p;
}

static void forget(void *p) {
    pthread_mutex_lock(&blocks_mutex);
    int i = n_blocks - 1;
    while (i >= 0 && blocks[i] != p) i--;  // the youngest die first
    if (p && i < 0) fail("free of what was not allocated");
    if (p) blocks[i] = blocks[--n_blocks];
    pthread_mutex_unlock(&blocks_mutex);
}

static void *fuzz_calloc(size_t n, size_t size) { return n <= MAX_BLOCK / size ? keep(calloc(n, size)) : NULL; }
static void *fuzz_malloc(size_t n) { return n <= MAX_BLOCK ? keep(malloc(n)) : NULL; }
static void *fuzz_aligned_alloc(size_t unit, size_t n) {
    return n <= MAX_BLOCK ? keep(aligned_alloc(unit, n)) : NULL;
}
static void *fuzz_realloc(void *p, size_t n) {
    if (n > MAX_BLOCK) return NULL;
    forget(p);
    return keep(realloc(p, n));
}
static void fuzz_free(void *p) {
    forget(p);
    free(p);
}

static void add_file(const char *name, const void *data, size_t size, mode_t mode) {
    int i = 0;
    while (entries[i].name && strcmp(entries[i].name, name)) i++;
    if (i == MAX_FILES) fail("too many files");
    entries[i] = (Entry){name, data, size, mode};
}

static const Entry *find_file(const char *name) {
    const Entry *e = entries;
    while (e->name && strcmp(e->name, name)) e++;
    errno = ENOENT;
    return e->name ? e : NULL;
}

static FILE *fuzz_fopen(const char *name, const char *mode) {
    const Entry *e = find_file(name);
    int i = 0;
    while (streams[i]) i++;
    if (!e) return NULL;
    opened = e;
    return streams[i] = fmemopen((void *)(uintptr_t)e->data, e->size, mode);
}

static int fuzz_fclose(FILE *f) {
    int i = 0;
    while (streams[i] != f) i++;
    streams[i] = NULL;
    return fclose(f);
}

static int fill_stat(const Entry *e, struct stat *st) {
    if (e) *st = (struct stat){.st_mode = e->mode, .st_size = (off_t)e->size};
    return e ? 0 : -1;
}

static void *fuzz_map(size_t n) {
    void *p = fuzz_malloc(n);
    return p ? memcpy(p, opened->data, n) : MAP_FAILED;
}

static int fuzz_pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*start)(void *), void *context) {
    if (n_threads == MAX_THREADS) return EAGAIN;
    int error = pthread_create(t, a, start, context);
    if (!error) threads[n_threads++] = *t;
    return error;
}

static void unlock(void *mutex) { pthread_mutex_unlock(mutex); }

// Where a thread can be cancelled
static int fuzz_pthread_cond_wait(pthread_cond_t *c, pthread_mutex_t *mutex) {
    int error;
    pthread_cleanup_push(unlock, mutex);
    error = pthread_cond_wait(c, mutex);
    pthread_cleanup_pop(0);
    return error;
}

// Threads end while what they wait for is still on the stack, then that is left.
static _Noreturn void fuzz_exit(int code) {
    for (int i = 0; i < n_threads; i++) pthread_cancel(threads[i]);
    for (int i = 0; i < n_threads; i++) pthread_join(threads[i], NULL);
    longjmp(back, code + 1);
}

// What a run reads on stdin; its stderr begins empty.
static void begin(const void *typed, size_t n) {
    if (!output) output = fopen("/dev/null", "w");
    input = fmemopen((void *)(uintptr_t)typed, n, "r");
    errors = fmemopen(errors_text, sizeof errors_text, "w");
    if (!output || !input || !errors) fail("no streams");
}

// Ends what a run that exited left; one that returned leaves nothing.
static void finish(bool returned, int code) {
    fclose(input);
    fclose(errors);
    for (int i = 0; i < MAX_FILES; i++) {
        if (streams[i] && returned) fail("a file is still open");
        if (streams[i]) fclose(streams[i]);
        streams[i] = NULL;
    }
    if (returned && n_blocks) fail("memory leaks");
    while (n_blocks) free(blocks[--n_blocks]);
    n_threads = 0;
    if (code == 0) return;
    const size_t n = strlen(errors_text);
    size_t last = n ? n - 1 : 0;
    while (last && errors_text[last - 1] != '\n') last--;
    if (code != 1) fail("an exit code other than 1");
    if (strncmp(errors_text + last, "run: ", 5) || errors_text[n - 1] != '\n') fail("not a line");
}

// A whole file of the machine, for replay
static unsigned char *read_input(const char *path, size_t *n) {
    FILE *f = fopen(path, "rb");
    unsigned char *data = malloc(1 << 20);
    if (!f || !data) {
        fprintf(stderr, "fuzz: cannot read %s\n", path);
        exit(2);
    }
    *n = fread(data, 1, 1 << 20, f);
    fclose(f);
    return realloc(data, *n ? *n : 1);  // exactly its size
}

static void free_input(unsigned char *data) { free(data); }

#undef stdin
#undef stdout
#undef stderr
#define stdin input
#define stdout output
#define stderr errors
#define printf(...) fprintf(output, __VA_ARGS__)
#define putchar(c) fputc(c, output)
#define getchar() fgetc(input)
#define malloc fuzz_malloc
#define calloc fuzz_calloc
#define aligned_alloc fuzz_aligned_alloc
#define realloc fuzz_realloc
#define free fuzz_free
#define exit fuzz_exit
#define fopen fuzz_fopen
#define fclose fuzz_fclose
#define stat(name, st) fill_stat(find_file(name), st)
#define fstat(fd, st) ((void)(fd), fill_stat(opened, st))
#define mmap(address, n, protection, flags, fd, offset) ((void)(fd), fuzz_map(n))
#define madvise(address, n, advice) ((void)(address), (void)(n), (void)(advice))  // a file given back would be lost
#define munmap(p, n) ((void)(n), fuzz_free(p))
#define pthread_create fuzz_pthread_create
#define pthread_cond_wait fuzz_pthread_cond_wait
#define time(t) ((time_t)1)
#define main run_main
#include "run.c"
#undef main

// ---------------------------------------------------------------------------------------------------------
// Runs of the program

static bool run_program(int argc, char **argv, const void *typed, size_t n) {
    begin(typed, n);
    const int jumped = setjmp(back);
    if (!jumped) finish(true, run_main(argc, argv));
    else finish(false, jumped - 1);
    return !jumped;
}

// The same of words separated by spaces
static bool run_line(const char *line) {
    char words[256], *argv[32] = {"run"};
    int argc = 1;
    snprintf(words, sizeof words, "%s", line);
    for (char *p = strtok(words, " "); p && argc < 31; p = strtok(NULL, " ")) argv[argc++] = p;
    argv[argc] = NULL;
    return run_program(argc, argv, "", 0);
}

// ---------------------------------------------------------------------------------------------------------
// Tokenizers and models made here

enum { WITH_BYTES, WITHOUT_BYTES, TIES, N_SHAPES };
static struct { unsigned char data[8192]; size_t n; } tokenizers[N_SHAPES];
static struct { unsigned char data[1 << 16]; size_t n; } small_model, int8_model;

static void put(unsigned char *data, size_t *n, const void *bytes, size_t length) {
    memcpy(data + *n, bytes, length);
    *n += length;
}

static void put_piece(int shape, const char *piece, float score) {
    const uint32_t length = (uint32_t)strlen(piece);
    put(tokenizers[shape].data, &tokenizers[shape].n, &score, 4);
    put(tokenizers[shape].data, &tokenizers[shape].n, &length, 4);
    put(tokenizers[shape].data, &tokenizers[shape].n, piece, length);
}

// All the byte pieces; none; all but one, and all scores alike. Returns how many pieces there are.
static int make_tokenizer(int shape) {
    static const char *const pieces[] = {
        " ", "a", "b", "ab", " a", "c", "t", "h", "e", "th", "the", " the", "", "aa", "aaaa", "aaa", "abab",
        "bc", "abc", "\xC3\xA9", "\xE4\xB8\xAD", "\xF0\x9F\x98\x80", "e\xCC\x81", "\xE2\x96\x81", "\xC3",
        "ab", "\xEF\xBF\xBD", "\xEF\xBF\xBD\xEF\xBF\xBD", "  ", "    ", "\n", "\n\n", "\x1B[2J", "<s>",
        "[INST]", "[", "]",
    };
    int size = 3;
    const int32_t longest = 9;
    tokenizers[shape].n = 0;
    put(tokenizers[shape].data, &tokenizers[shape].n, &longest, 4);
    put_piece(shape, "<unk>", 0);
    put_piece(shape, "\n<s>\n", 0);
    put_piece(shape, "\n</s>\n", 0);
    for (int b = 0; shape != WITHOUT_BYTES && b < (shape == TIES ? 255 : 256); b++, size++) {
        char piece[16];
        snprintf(piece, sizeof piece, "<0x%02X>", (unsigned)b);
        put_piece(shape, piece, 0);
    }
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++, size++) {
        put_piece(shape, pieces[i], shape == TIES ? 0.5f : -(float)i);
    }
    return size;
}

enum { WIDTH = 8, HIDDEN = 8, HEADS = 2, KV_HEADS = 1, KV_WIDTH = 4, CONTEXT = 150 };

// The same as v2
static void make_int8_model(int vocab_size) {
    const int32_t header[] = {MODEL_MAGIC, 2, WIDTH, HIDDEN, 1, HEADS, KV_HEADS, vocab_size, CONTEXT}, group = 8;
    const int rows[] = {vocab_size, WIDTH, KV_WIDTH, KV_WIDTH, WIDTH, HIDDEN, HIDDEN, HIDDEN};
    uint64_t random = 42;
    size_t *n = &int8_model.n;
    memcpy(int8_model.data, header, sizeof header);
    int8_model.data[sizeof header] = 1;
    memcpy(int8_model.data + sizeof header + 1, &group, sizeof group);
    *n = V1_HEADER;
    for (int i = 0; i < 3 * WIDTH; i++) put(int8_model.data, n, &(float){1}, 4);
    for (size_t t = 0; t < sizeof rows / sizeof *rows; t++) {
        for (int i = 0; i < rows[t] * WIDTH; i++) {
            const bool end = t == 0 && i / WIDTH == EOS;
            put(int8_model.data, n, &(int8_t){(int8_t)(end ? 108 : 250 * random_float(&random) - 125)}, 1);
        }
        for (int i = 0; i < rows[t]; i++) put(int8_model.data, n, &(float){1 / 64.0f}, 4);
    }
}

// A v1 model of one layer with the weights of a small random generator
static void make_model(int vocab_size) {
    const int32_t header[] = {MODEL_MAGIC, 1, WIDTH, HIDDEN, 1, HEADS, KV_HEADS, vocab_size, CONTEXT, 1};
    const int rows = 3 + vocab_size + 2 * WIDTH + 2 * KV_WIDTH + 3 * HIDDEN;
    uint64_t random = 42;
    memcpy(small_model.data, header, sizeof header);
    small_model.n = V1_HEADER;
    for (int i = 0; i < rows * WIDTH; i++) {
        const bool end = i / WIDTH == 3 + EOS;  // is likely: most stories are short
        const float x = i < 3 * WIDTH ? 1 : end ? 1.7f : 4 * random_float(&random) - 2;
        put(small_model.data, &small_model.n, &x, 4);
    }
}

static void make_files(void) {
    if (small_model.n) return;
    for (int shape = N_SHAPES - 1; shape >= 0; shape--) {
        const int size = make_tokenizer(shape);
        if (shape == WITH_BYTES) {
            make_model(size);
            make_int8_model(size);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------
// A slow, plain encoder

enum { MAX_PLAIN = 64 };  // bytes of text
#ifdef FUZZ  // what happens here tells the fuzzer nothing about run.c, and takes time
    #define PLAIN static __attribute__((no_sanitize("coverage")))
#else
    #define PLAIN static
#endif

typedef struct {
    unsigned char text[3 * MAX_PLAIN + 1];
    int start[MAX_PLAIN + 1], length[MAX_PLAIN + 1];  // of each symbol
    int merged[MAX_PLAIN + 1];  // the id of each symbol and the next one together, -1 if there is none
    int n;
} Symbols;

PLAIN int plain_find(const Tokenizer *t, const unsigned char *s, int n) {
    for (int id = 3; id < t->size; id++) {
        const bool text = parse_byte_piece(t->piece[id], t->length[id]) < 0 && t->length[id] > 0;
        if (text && t->length[id] == n && !memcmp(t->piece[id], s, (size_t)n)) return id;
    }
    return -1;
}

// The character at s by its code point, -1 if there is none; its bytes in *used
PLAIN int32_t code_point(const unsigned char *s, size_t n, size_t *used) {
    static const int32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    const unsigned char c = s[0];
    const size_t length = c >> 7 == 0 ? 1 : c >> 5 == 6 ? 2 : c >> 4 == 14 ? 3 : c >> 3 == 30 ? 4 : 0;
    *used = 1;
    if (length == 0 || length > n) return -1;
    int32_t code = length == 1 ? c : c & (0xFF >> (length + 1));
    for (size_t i = 1; i < length; i++) {
        if (s[i] >> 6 != 2) return -1;
        code = code << 6 | (s[i] & 63);
    }
    if (code < least[length] || (code >= 0xD800 && code < 0xE000) || code > 0x10FFFF) return -1;
    *used = length;
    return code;
}

PLAIN void plain_split(Symbols *s, const unsigned char *text, size_t n) {
    int at = 1;
    *s = (Symbols){.text = " ", .length = {1}, .n = 1};
    for (size_t i = 0, used; i < n; i += used) {
        const int32_t code = code_point(text + i, n - i, &used);
        const char *c = code < 0 ? "\xEF\xBF\xBD" : code == 0x2581 ? " " : NULL;
        const int length = c ? (int)strlen(c) : (int)used;
        memcpy(s->text + at, c ? (const unsigned char *)c : text + i, (size_t)length);
        s->start[s->n] = at;
        s->length[s->n++] = length;
        at += length;
    }
}

PLAIN void look_up_pair(const Tokenizer *t, Symbols *s, int i) {
    if (i < 0 || i + 1 >= s->n) return;
    s->merged[i] = plain_find(t, s->text + s->start[i], s->length[i] + s->length[i + 1]);
}

// Merges the pair with the best score, the first of equal ones, until there is none.
PLAIN void plain_merge(const Tokenizer *t, Symbols *s) {
    for (int i = 0; i < s->n; i++) look_up_pair(t, s, i);
    for (int best; ; ) {
        best = -1;
        for (int i = 0; i + 1 < s->n; i++) {
            if (s->merged[i] < 0) continue;
            if (best < 0 || t->score[s->merged[i]] > t->score[s->merged[best]]) best = i;
        }
        if (best < 0) return;
        s->length[best] += s->length[best + 1];
        s->n--;
        for (int i = best + 1; i < s->n; i++) {
            s->start[i] = s->start[i + 1];
            s->length[i] = s->length[i + 1];
            s->merged[i] = s->merged[i + 1];
        }
        look_up_pair(t, s, best - 1);
        look_up_pair(t, s, best);
    }
}

PLAIN int plain_byte(const Tokenizer *t, unsigned char byte) {
    int id = 0;
    while (id < t->size && parse_byte_piece(t->piece[id], t->length[id]) != byte) id++;
    return id < t->size ? id : -1;
}

// The ids of merged symbols; returns how many.
PLAIN int plain_ids(const Tokenizer *t, const Symbols *s, int *ids) {
    int n = 0;
    bool all_bytes = true;
    for (int b = 0; all_bytes && b < 256; b++) all_bytes = plain_byte(t, (unsigned char)b) >= 0;
    ids[n++] = BOS;
    for (int i = 0; i < s->n; i++) {
        const unsigned char *c = s->text + s->start[i];
        const int id = plain_find(t, c, s->length[i]);
        const bool space = s->length[i] == 1 && *c == ' ';
        if (id >= 0) {
            ids[n++] = id;
        } else if (all_bytes) {
            const unsigned char *spelled = space ? (const unsigned char *)"\xE2\x96\x81" : c;
            for (int k = 0; k < (space ? 3 : s->length[i]); k++) ids[n++] = plain_byte(t, spelled[k]);
        } else if (ids[n - 1] != UNK) {
            ids[n++] = UNK;
        }
    }
    return n;
}

static void compare(const Tokenizer *t, const Tokens *tokens, const char *text, size_t n) {
    static Symbols s;
    static int ids[4 * (MAX_PLAIN + 1)];
    int count = 1;
    ids[0] = BOS;
    if (n > 0) {
        plain_split(&s, (const unsigned char *)text, n);
        plain_merge(t, &s);
        count = plain_ids(t, &s, ids);
    }
    if (count != tokens->n || memcmp(ids, tokens->ids, (size_t)count * sizeof *ids)) fail("other ids");
}

// There and back
static void check_text(const Tokenizer *t, const char *text, size_t n) {
    Tokens tokens = encode(t, text, n);
    Text out = {0};
    if (tokens.n < 1 || (size_t)tokens.n > 4 * (n + 1) || tokens.ids[0] != BOS) fail("no ids, or too many");
    for (int i = 0; i < tokens.n; i++) {
        const int id = tokens.ids[i];
        if (id < 0 || (id >= t->size && id != BOS && id != UNK)) fail("an id out of range");
        append_token(&out, t, i ? tokens.ids[i - 1] : BOS, id);
    }
    for (size_t i = 0; i < out.len; i++) {
        const unsigned char c = (unsigned char)out.data[i];
        if (iscntrl(c) && !isspace(c)) fail("a control character");
    }
    if (n <= MAX_PLAIN && t->size <= 1024) compare(t, &tokens, text, n);
    free(out.data);
    free(tokens.ids);
}

// ---------------------------------------------------------------------------------------------------------
// Targets

// Large fp32 models are read in place, by rows: here a small one.
static void use_in_place(const Kernels *kernels) {
    static const int ids[] = {1, 2, 0, 1, 1, 2};
    Model m;
    Pool pool;
    load_model(&m, "m", kernels);
    KVCache cache = new_cache(&m, 6);
    start_pool(&pool, 1, false);
    m.pool = &pool;
    if (m.config.bits == 32) prefill(&m, &cache, ids, m.config.seq_len < 6 ? m.config.seq_len : 6, 0);
    free(cache.block);
    free_model(&m);
    stop_pool(&pool);
}

static void run_in_place(const Kernels *kernels) {
    begin("", 0);
    const int jumped = setjmp(back);
    if (!jumped) use_in_place(kernels);
    finish(!jumped, jumped ? jumped - 1 : 0);
}

static void fuzz_model(const uint8_t *data, size_t n) {  // model.bin
    char line[256];
    if (n > 1 << 16) return;  // takes too long, and so do many layers, unless their size overflows soon
    if (n >= V0_HEADER) {
        const uint8_t *ints = data + (i32_at(data) == MODEL_MAGIC ? 8 : 0);
        if (i32_at(ints + 8) > 300 && i32_at(ints) < MAX_WIDTH) return;
    }
    add_file("m", data, n, S_IFREG);
    add_file("w", tokenizers[WITHOUT_BYTES].data, tokenizers[WITHOUT_BYTES].n, S_IFREG);
    if (!run_line("m -z w --tokens")) return;
    for (size_t i = 0; i < N_KERNELS; i++) {
        if (!usable(all_kernels[i])) continue;
        const char *name = all_kernels[i]->name;
        snprintf(line, sizeof line, "m -z w -s 1 -n 6 --kernels %s", name);
        run_line(line);
        snprintf(line, sizeof line, "m -z w -s 5 -n 20 -b 2 -k 9 -i abababbbaaabb --kernels %s", name);
        run_line(line);
        snprintf(line, sizeof line, "m -z w -s 3 -n 12 --draft 3 --kernels %s", name);
        run_line(line);
        run_in_place(all_kernels[i]);
    }
}

static void use_tokenizer(const char *name) {
    static const char text[] =
        "the  \xC3\xA9 <s> \xF0\x9F\x98\x80 <0x41> \xE2\x96\x81 \xFF\xED\xA0\x80\n\n ab aaaaa";
    char own[MAX_PLAIN];
    size_t n = 0;
    Tokenizer t;
    Text out = {0};
    load_tokenizer(&t, name);
    for (int id = 0; id < t.size; id++) {
        append_token(&out, &t, id % 2 ? BOS : id - 1, id);
        if ((size_t)t.length[id] > sizeof own - n) continue;
        put((unsigned char *)own, &n, t.piece[id], (size_t)t.length[id]);
    }
    check_text(&t, text, sizeof text - 1);
    check_text(&t, own, n);  // has what can be merged
    check_text(&t, "", 0);
    free(out.data);
    free_tokenizer(&t);
}

static void fuzz_tokenizer(const uint8_t *data, size_t n) {  // tokN.bin
    if (n > 1 << 16) return;
    add_file("t", data, n, S_IFREG);
    begin("", 0);
    const int jumped = setjmp(back);
    if (!jumped) use_tokenizer("t");
    finish(!jumped, jumped ? jumped - 1 : 0);
}

static void encode_with(int shape, const uint8_t *data, size_t n) {
    Tokenizer t;
    add_file("t", tokenizers[shape].data, tokenizers[shape].n, S_IFREG);
    begin("", 0);
    if (setjmp(back)) fail("a prompt that is not encoded");
    load_tokenizer(&t, "t");
    check_text(&t, (const char *)data, n);
    free_tokenizer(&t);
    finish(true, 0);
}

static void fuzz_prompt(const uint8_t *data, size_t n) {
    for (int shape = 0; n <= 1 << 14 && shape < N_SHAPES; shape++) encode_with(shape, data, n);
}

// How many tokens a command line asks for; 0 when it runs nothing.
static uint64_t work_of(int argc, char **argv) {
    static uint64_t work;
    work = 0;
    begin("", 0);
    const int jumped = setjmp(back);
    if (!jumped) {
        Options o = parse_options(argc, argv);
        work = (uint64_t)o.stories * (o.steps > 0 && o.steps < 150 ? (unsigned)o.steps : 150);
        if (o.threads > 1) work *= 24;  // they wait for each other, and here for the fuzzer's counters
    }
    finish(!jumped, jumped ? jumped - 1 : 0);
    return work;
}

// A word a line, then a NUL and what is typed on stdin
static void fuzz_cli(const uint8_t *data, size_t n) {
    static char words[4096], story[] = "abc the <|endoftext|>\n <|endoftext|>", many[700];
    char *argv[64] = {"run"};
    int argc = 1;
    const uint8_t *end = n ? memchr(data, 0, n) : NULL;
    const size_t length = end ? (size_t)(end - data) : n;
    if (length >= sizeof words) return;
    memcpy(words, data, length);
    words[length] = '\0';
    for (char *p = words, *next; length && p && argc < 63; p = next) {
        next = strchr(p, '\n');
        if (next) *next++ = '\0';
        argv[argc++] = p;
    }
    argv[argc] = NULL;
    memset(many, 'c', sizeof many);  // more tokens than the context holds
    add_file("m", small_model.data, small_model.n, S_IFREG);
    add_file("q", int8_model.data, int8_model.n, S_IFREG);
    add_file("tokenizer.bin", tokenizers[WITH_BYTES].data, tokenizers[WITH_BYTES].n, S_IFREG);
    add_file("w", tokenizers[WITHOUT_BYTES].data, tokenizers[WITHOUT_BYTES].n, S_IFREG);
    add_file("f", story, sizeof story - 1, S_IFREG);
    add_file("p", many, sizeof many, S_IFIFO);
    add_file("d", "", 0, S_IFDIR);
    add_file("c", "", 0, S_IFCHR);
    add_file("e", "", 0, S_IFREG);
    const uint64_t work = work_of(argc, argv);
    if (work && work <= 600) run_program(argc, argv, end ? end + 1 : data, end ? n - length - 1 : 0);
}

static const struct { const char *name; void (*run)(const uint8_t *data, size_t n); } targets[] = {
    {"model", fuzz_model}, {"tokenizer", fuzz_tokenizer}, {"prompt", fuzz_prompt}, {"cli", fuzz_cli},
};

#ifdef FUZZ  // the name of a target
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    (void)targets;
    (void)read_input;
    (void)free_input;
    make_files();
    CONCAT(fuzz, FUZZ)(data, n);
    return 0;
}
#else
int main(int argc, char **argv) {
    make_files();
    for (size_t i = 0; argc > 1 && i < sizeof targets / sizeof *targets; i++) {
        if (strcmp(argv[1], targets[i].name)) continue;
        for (int a = 2; a < argc; a++) {
            size_t n;
            unsigned char *data = read_input(argv[a], &n);
            targets[i].run(data, n);
            free_input(data);
        }
        return 0;
    }
    return 2;
}
#endif
