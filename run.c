/*
 * run.c - inference for Llama models on the CPU, in one file of plain C11.
 *
 *   cc -O3 -ffp-contract=off -o run run.c -lm
 *   ./run model.bin -z data/tok4096.bin -i "Once upon a time" -t 0.8
 *   ./run --help
 *
 * Reads the three layouts that export.py writes (and llama2.c's export.py before it): v0 and v1 hold fp32
 * weights, v2 int8 weights in groups that share one fp32 scale. The header says which.
 * Nothing in a file is believed before it is checked: sizes are computed with overflow checks and must equal
 * the file's real size, so a damaged file is one line on stderr and exit code 1.
 *
 * Not for: training, other architectures, batches, big-endian machines.
 */
#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64   // files above 2 GB on 32-bit systems
#define _CRT_SECURE_NO_WARNINGS

#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
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
    #define isatty _isatty
    #define fileno _fileno
#else
    #include <sys/mman.h>
    #include <unistd.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "model files are little-endian and are used in place: big-endian machines are not supported"
#endif
#ifdef __clang__
    #pragma STDC FP_CONTRACT OFF  // as -ffp-contract=off: a*b+c rounds alike on every machine
#endif

enum { UNK = 0, BOS = 1, EOS = 2 };   // the ids of Llama's special tokens

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
    int group_size;          // int8 values that share a scale; 0: the weights are fp32
    bool shared_classifier;  // the classifier is the embedding table
    float rope_theta;
    float norm_eps;
} Config;

typedef struct {                 // a matrix (rows, cols), row-major: fp32 in f, or int8 groups in q and scale
    const float *f;              // (rows, cols), or NULL
    const int8_t *q;             // (rows, cols), or NULL
    const unsigned char *scale;  // (rows, cols / group) float32, which a group < 4 may leave unaligned
    int rows, cols;
    int group;                   // 0 for fp32
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

typedef struct {      // the input of a matmul; q and scale are filled by quantize() and stay unused for fp32
    float *f;         // (n,)
    int8_t *q;        // (n,)
    float *scale;     // (n / group,)
} Activation;

typedef struct {
    float *x;            // (dim,) the residual stream
    Activation xb;       // (dim,) normalised x, then the heads' output
    float *xb2;          // (dim,) what a block adds to x
    Activation hb;       // (hidden_dim,)
    float *hb2;          // (hidden_dim,)
    float *q;            // (n_heads, head_size)
    float *k;            // (n_kv_heads, head_size)
    float *att;          // (n_positions,) one head's scores
    float *logits;       // (vocab_size,)
    float *key_cache;    // (n_layers, kv_dim, n_positions): scores of all positions are computed at once
    float *value_cache;  // (n_layers, n_positions, kv_dim)
    float *rope;         // (n_positions, head_size / 2, 2) cosine and sine
    int n_positions;     // room in the caches, at most seq_len
} RunState;

typedef struct {
    const unsigned char *data;
    size_t size;
    bool mapped;  // by mmap, else malloc'ed
} File;

typedef struct {
    const char *path;
    File file;  // the weights point into it
    Config config;
    Weights weights;
    RunState state;
} Model;

typedef struct {      // text by length: it may hold NUL bytes
    char *data;
    size_t len, cap;
} Text;

// ---------------------------------------------------------------------------------------------------------
// Errors, memory, files

// One line "run: SUBJECT: what is wrong" and exit code 1. The subject is a file or an option.
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static _Noreturn void die(const char *subject, const char *format, ...) {
    char line[2048];
    va_list args;
    int n = snprintf(line, sizeof line, "run: %.900s%s", subject, *subject ? ": " : "");
    va_start(args, format);
    if (n >= 0 && (size_t)n < sizeof line) vsnprintf(line + n, sizeof line - (size_t)n, format, args);
    va_end(args);
    for (char *c = line; *c; c++) {  // names come from the user: keep it one line, and no terminal escapes
        if ((unsigned char)*c < 32 || *c == 127) *c = '?';
    }
    fflush(stdout);  // what was said before stays before
    fprintf(stderr, "%s\n", line);
    exit(EXIT_FAILURE);
}

static bool mul_overflows(size_t a, size_t b, size_t *product) {
    *product = a * b;
    return b != 0 && a > SIZE_MAX / b;
}

// Zeroed memory for a * b elements; never returns NULL, not even for 0 of them.
static void *allocate(size_t a, size_t b, size_t element, const char *what) {
    size_t count, bytes;
    bool overflows = mul_overflows(a, b, &count) || mul_overflows(count, element, &bytes);
    void *p = !overflows && bytes <= PTRDIFF_MAX ? calloc(bytes ? bytes : 1, 1) : NULL;
    if (!p) die("", "out of memory for %s: %.0f MB", what, (double)a * (double)b * (double)element / 1e6);
    return p;
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
    File file = {0};
    struct stat st;
    FILE *f = fopen(path, "rb");
    if (!f) die(path, "cannot open: %s%s", strerror(errno), errno == ENOENT ? hint : "");
    if (fstat(fileno(f), &st) != 0) die(path, "cannot read: %s", strerror(errno));
#ifndef _WIN32
    if (S_ISDIR(st.st_mode)) die(path, "is a directory, not a file");
    if (S_ISCHR(st.st_mode)) die(path, "is a device, not a file");
    if (S_ISREG(st.st_mode) && st.st_size > 0 && (uintmax_t)st.st_size <= SIZE_MAX) {
        void *data = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE, fileno(f), 0);
        if (data == MAP_FAILED) die(path, "cannot map into memory: %s", strerror(errno));
        file = (File){.data = data, .size = (size_t)st.st_size, .mapped = true};
    }
#endif
    if (!file.mapped) {  // Windows, a pipe, an empty file
        Text all = read_stream(f, path);
        file = (File){.data = (unsigned char *)all.data, .size = all.len, .mapped = false};
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

static void check_stdout(void) {
    if (ferror(stdout)) die("stdout", "cannot write: %s", errno ? strerror(errno) : "write error");
}

static void flush_stdout(void) {
    errno = 0;
    if (fflush(stdout) != 0) die("stdout", "cannot write: %s", errno ? strerror(errno) : "write error");
    check_stdout();
}

// Values inside a mapped file may lie at any address; memcpy compiles to a plain load.
static int32_t i32_at(const unsigned char *p) { int32_t v; memcpy(&v, p, sizeof v); return v; }
static float f32_at(const unsigned char *p) { float v; memcpy(&v, p, sizeof v); return v; }

// ---------------------------------------------------------------------------------------------------------
// Loading: header, then one walk over the tensors that finds every pointer and the file's exact size

enum { MODEL_MAGIC = 0x616b3432, V0_HEADER = 28, V1_HEADER = 256 };
enum { MAX_WIDTH = 1 << 24, MAX_LAYERS = 1 << 14 };
enum { MAX_GROUP = 1 << 16 };  // the sum of this many int8 products fits in int32

typedef struct {
    const char *path;
    const File *file;
    size_t at;  // bytes walked over; goes on past a truncated file's end, to know the size it should have
} Walk;

// The next n bytes, or NULL when the file ends before them.
static const unsigned char *take(Walk *w, size_t a, size_t b, size_t element) {
    size_t start = w->at, count, bytes;
    if (mul_overflows(a, b, &count) || mul_overflows(count, element, &bytes) || bytes > SIZE_MAX - start) {
        die(w->path, "the header describes a model larger than memory can address");
    }
    w->at = start + bytes;
    return w->at <= w->file->size ? w->file->data + start : NULL;
}

static const float *take_floats(Walk *w, int n) {
    // aligned: mmap and malloc are, headers are multiples of 4, and in v2 these come before the int8 data
    return (const float *)(const void *)take(w, 1, n, sizeof(float));
}

static Tensor take_tensor(Walk *w, const Config *c, int rows, int cols) {
    Tensor t = {.rows = rows, .cols = cols, .group = c->group_size};
    if (t.group == 0) {
        t.f = (const float *)(const void *)take(w, rows, cols, sizeof(float));
    } else {
        t.q = (const int8_t *)take(w, rows, cols, 1);
        t.scale = take(w, rows, cols / t.group, sizeof(float));
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

// Files that people hand over by mistake: say what they are.
static void refuse_other_formats(const char *path, const File *file) {
    const unsigned char *d = file->data;
    size_t n = file->size < 64 ? file->size : 64;
    bool text = true;
    if (n == 0) die(path, "the file is empty");
    if (n >= 4 && (!memcmp(d, "PK\3\4", 4) || (d[0] == 0x80 && d[1] >= 2 && d[1] <= 5 && d[2] && d[3]))) {
        die(path, "this is a PyTorch checkpoint; convert it: "
            "python export.py model.bin --checkpoint %s", path);
    }
    const char *other = n >= 4 && !memcmp(d, "GGUF", 4) ? "GGUF"
                      : n >= 10 && !d[7] && !memcmp(d + 8, "{\"", 2) ? "safetensors" : NULL;
    if (other) die(path, "this is a %s file; run needs a model.bin in llama2.c's format", other);
    for (size_t i = 0; i < n; i++) {
        if (d[i] < '\t' || (d[i] > '\r' && d[i] < ' ') || d[i] >= 0xF8) text = false;
    }
    if (text) die(path, "this is a text file, not a model");  // a v0 header always holds zero bytes
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
            die(path, "not a model, or damaged: %s in the header is %d (expected %d to %d)",
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
    const unsigned char *d = f->file->data;
    int version = 0;
    const unsigned char *ints = d;
    refuse_other_formats(f->path, f->file);
    if (f->file->size < V0_HEADER) die(f->path, "truncated: %zu bytes are no model", f->file->size);
    if (i32_at(d) == MODEL_MAGIC) {
        version = i32_at(d + 4);
        if (version < 1 || version > 2) die(f->path, "model version %d; run knows 0, 1 and 2", version);
        if (f->file->size < V1_HEADER) die(f->path, "truncated: the file ends inside its header");
        ints = d + 8;
    }
    int vocab_size = i32_at(ints + 20);
    *c = (Config){
        .dim = i32_at(ints), .hidden_dim = i32_at(ints + 4), .n_layers = i32_at(ints + 8),
        .n_heads = i32_at(ints + 12), .n_kv_heads = i32_at(ints + 16), .vocab_size = vocab_size,
        .seq_len = i32_at(ints + 24), .shared_classifier = true, .rope_theta = 10000.0f, .norm_eps = 1e-5f,
    };
    if (version == 0) {
        f->at = V0_HEADER;
        c->shared_classifier = vocab_size > 0;  // v0's only way to say "untied" is a negative size
        if (vocab_size < 0 && vocab_size != INT_MIN) c->vocab_size = -vocab_size;
    } else {
        f->at = V1_HEADER;
        if (d[36] > 1) die(f->path, "damaged header: the shared-classifier byte is %d", d[36]);
        c->shared_classifier = d[36] == 1;
        if (f32_at(d + 48) != 0) c->rope_theta = f32_at(d + 48);  // bytes that llama2.c leaves zero
        if (f32_at(d + 52) != 0) c->norm_eps = f32_at(d + 52);
    }
    check_config(f->path, c);
    c->head_size = c->dim / c->n_heads;
    c->kv_dim = c->n_kv_heads * c->head_size;
    if (version == 2) {
        int group = i32_at(d + 37);
        if (group < 1 || group > MAX_GROUP || c->dim % group || c->hidden_dim % group) {
            die(f->path, "int8 group size %d does not divide dim %d and hidden_dim %d; export it again",
                group, c->dim, c->hidden_dim);
        }
        c->group_size = group;
    }
    return version;
}

static float *floats(size_t a, size_t b) {
    return allocate(a, b, sizeof(float), "the model's state (a smaller -n needs less)");
}

static Activation activation(int n) {
    return (Activation){.f = floats(n, 1), .q = allocate(n, 1, 1, "activations"), .scale = floats(n, 1)};
}

// float32 throughout, as PyTorch computed the tables the model was trained with
static void fill_rope(RunState *s, const Config *c) {
    for (int i = 0; i < c->head_size / 2; i++) {
        float frequency = 1.0f / powf(c->rope_theta, (float)(2 * i) / (float)c->head_size);
        for (int pos = 0; pos < s->n_positions; pos++) {
            float angle = (float)pos * frequency;
            float *pair = s->rope + ((size_t)pos * (c->head_size / 2) + (size_t)i) * 2;
            pair[0] = cosf(angle);
            pair[1] = sinf(angle);
        }
    }
}

static void allocate_state(RunState *s, const Config *c, int n_positions) {
    const size_t kv = (size_t)c->n_layers * c->kv_dim;  // in range: both were checked
    *s = (RunState){
        .n_positions = n_positions,
        .x = floats(c->dim, 1), .xb = activation(c->dim), .xb2 = floats(c->dim, 1),
        .hb = activation(c->hidden_dim), .hb2 = floats(c->hidden_dim, 1),
        .q = floats(c->dim, 1), .k = floats(c->kv_dim, 1), .att = floats(n_positions, 1),
        .logits = floats(c->vocab_size, 1),
        .key_cache = floats(n_positions, kv), .value_cache = floats(n_positions, kv),
        .rope = floats(n_positions, c->head_size),
    };
    fill_rope(s, c);
}

// Opens a model and makes room for max_positions of context (0, or more than it has: all of its seq_len).
static void load_model(Model *m, const char *path, int max_positions) {
    *m = (Model){.path = path, .file = open_file(path, "; train.py makes a model, and of a checkpoint: "
                                                       "python export.py model.bin")};
    Walk f = {.path = path, .file = &m->file};
    Config *c = &m->config;
    int version = read_header(&f, c);
    m->weights.layers = allocate(c->n_layers, 1, sizeof(Layer), "layers");
    walk_weights(&f, c, version, &m->weights);
    if (f.at > m->file.size) {
        die(path, "truncated: %zu bytes, but its header describes %zu", m->file.size, f.at);
    }
    if (f.at < m->file.size) {
        die(path, "damaged: %zu bytes, but its header describes only %zu", m->file.size, f.at);
    }
    bool fewer = max_positions > 0 && max_positions < c->seq_len;
    allocate_state(&m->state, c, fewer ? max_positions : c->seq_len);
}

static void free_model(Model *m) {
    RunState *s = &m->state;
    void *buffers[] = {s->x, s->xb.f, s->xb.q, s->xb.scale, s->xb2, s->hb.f, s->hb.q, s->hb.scale,
                       s->hb2, s->q, s->k, s->att, s->logits, s->key_cache, s->value_cache, s->rope,
                       m->weights.layers};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++) free(buffers[i]);
    close_file(&m->file);
}

// ---------------------------------------------------------------------------------------------------------
// Kernels

// Sixteen partial sums, added in a fixed order: the compiler may keep them in vector registers without
// -ffast-math, and every build gives the same bits. All other sums run in llama2.c's order, to its bits.
enum { LANES = 16 };

static float dot(const float *restrict a, const float *restrict b, int n) {
    float sum[LANES] = {0};
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int j = 0; j < LANES; j++) sum[j] += a[i + j] * b[i + j];
    }
    for (int j = 0; i < n; i++, j++) sum[j] += a[i] * b[i];
    for (int width = LANES / 2; width > 0; width /= 2) {
        for (int j = 0; j < width; j++) sum[j] += sum[j + width];
    }
    return sum[0];
}

static void rmsnorm(float *restrict out, const float *x, const float *weight, int n, float eps) {
    float squares = 0.0f;
    for (int i = 0; i < n; i++) squares += x[i] * x[i];
    float scale = 1.0f / sqrtf(squares / (float)n + eps);
    for (int i = 0; i < n; i++) out[i] = weight[i] * (scale * x[i]);
}

static void softmax(float *x, int n) {
    float max = x[0], sum = 0.0f;
    for (int i = 1; i < n; i++) {
        if (x[i] > max) max = x[i];  // keeps expf from overflowing
    }
    for (int i = 0; i < n; i++) {
        x[i] = expf(x[i] - max);
        sum += x[i];
    }
    for (int i = 0; i < n; i++) x[i] /= sum;
}

// Rounds each group of x to int8, symmetric, half away from zero. Does nothing for fp32 weights (group 0).
static void quantize(Activation *x, int n, int group) {
    for (int g = 0; group && g < n / group; g++) {
        const float *v = x->f + (size_t)g * group;
        int8_t *q = x->q + (size_t)g * group;
        float max = 0.0f;
        bool finite = true;
        for (int i = 0; i < group; i++) {
            float magnitude = fabsf(v[i]);
            if (magnitude > max) max = magnitude;
            finite &= magnitude <= FLT_MAX;
        }
        float scale = max / 127.0f;
        x->scale[g] = finite ? scale : NAN;  // lets a NaN reach the logits, where it is reported
        if (!finite || scale < FLT_MIN) {  // all zero, or so small that the scale itself is badly rounded
            memset(q, 0, (size_t)group);
            continue;
        }
        for (int i = 0; i < group; i++) {
            float exact = v[i] / scale;
            int whole = (int)exact;
            float rest = exact - (float)whole;
            q[i] = (int8_t)(whole + (rest >= 0.5f) - (rest <= -0.5f));
        }
    }
}

static float dot_int8(const Activation *x, const Tensor *w, int row) {
    const int8_t *q = w->q + (size_t)row * w->cols;
    const int n_groups = w->cols / w->group;
    const unsigned char *scale = w->scale + (size_t)row * n_groups * sizeof(float);
    float sum = 0.0f;
    for (int g = 0; g < n_groups; g++) {
        const int8_t *a = x->q + (size_t)g * w->group, *b = q + (size_t)g * w->group;
        int32_t products = 0;
        for (int i = 0; i < w->group; i++) products += (int32_t)a[i] * (int32_t)b[i];
        sum += (float)products * f32_at(scale + (size_t)g * sizeof(float)) * x->scale[g];
    }
    return sum;
}

// out (rows,) = w (rows, cols) @ x (cols,). All the model's weights are read here.
static void matmul(float *restrict out, const Activation *x, const Tensor *w) {
    if (w->group) {
        for (int i = 0; i < w->rows; i++) out[i] = dot_int8(x, w, i);
    } else {
        for (int i = 0; i < w->rows; i++) out[i] = dot(x->f, w->f + (size_t)i * w->cols, w->cols);
    }
}

static void copy_row(float *restrict out, const Tensor *w, int row) {
    size_t at = (size_t)row * w->cols;
    if (!w->group) {
        memcpy(out, w->f + at, (size_t)w->cols * sizeof(float));
        return;
    }
    for (size_t i = 0; i < (size_t)w->cols; i++) {
        out[i] = (float)w->q[at + i] * f32_at(w->scale + (at + i) / (size_t)w->group * sizeof(float));
    }
}

// Rotates each pair of neighbours in each head (RoFormer, arXiv 2104.09864) by the angles of one position.
static void rotate(float *heads, int n_heads, int head_size, const float *rope) {
    for (int h = 0; h < n_heads; h++) {
        float *v = heads + (size_t)h * head_size;
        for (int i = 0; i < head_size; i += 2) {
            float cosine = rope[i], sine = rope[i + 1], a = v[i], b = v[i + 1];
            v[i] = a * cosine + b * -sine;  // with a minus, gcc 12 fuses both in spite of -ffp-contract=off
            v[i + 1] = a * sine + b * cosine;
        }
    }
}

// out (n_heads, head_size): each query head over positions 0..pos of its layer's keys (kv_dim, n_positions)
// and values (n_positions, kv_dim)
static void attention(float *out, RunState *s, const Config *c, const float *keys, const float *values,
                      int pos) {
    const int size = c->head_size, queries_per_kv = c->n_heads / c->n_kv_heads;
    const size_t row = (size_t)s->n_positions, kv_dim = (size_t)c->kv_dim;
    const float root = sqrtf((float)size);
    float *restrict att = s->att;
    for (int h = 0; h < c->n_heads; h++) {
        const size_t kv_head = (size_t)(h / queries_per_kv) * size;
        const float *q = s->q + (size_t)h * size;
        float *restrict o = out + (size_t)h * size;
        memset(att, 0, ((size_t)pos + 1) * sizeof(float));
        for (int i = 0; i < size; i++) {
            const float *restrict k = keys + (kv_head + (size_t)i) * row;
            for (int t = 0; t <= pos; t++) att[t] += q[i] * k[t];
        }
        for (int t = 0; t <= pos; t++) att[t] /= root;
        softmax(att, pos + 1);
        memset(o, 0, (size_t)size * sizeof(float));
        for (int t = 0; t <= pos; t++) {
            const float *restrict v = values + (size_t)t * kv_dim + kv_head;
            for (int i = 0; i < size; i++) o[i] += att[t] * v[i];
        }
    }
}

static void add(float *restrict x, const float *restrict y, int n) {
    for (int i = 0; i < n; i++) x[i] += y[i];
}

// ---------------------------------------------------------------------------------------------------------
// Forward

// Feeds one token at pos (all positions before it were fed). Returns the logits (vocab_size,) for the next
// token, or NULL when they are not wanted, as inside a prompt.
static float *forward(Model *m, int token, int pos, bool want_logits) {
    const Config *c = &m->config;
    RunState *s = &m->state;
    const int group = c->group_size;
    const float *rope = s->rope + (size_t)pos * c->head_size;

    copy_row(s->x, &m->weights.tok_embeddings, token);
    for (int l = 0; l < c->n_layers; l++) {
        const Layer *w = &m->weights.layers[l];
        const size_t layer = (size_t)l * s->n_positions * (size_t)c->kv_dim;
        float *keys = s->key_cache + layer, *values = s->value_cache + layer;

        rmsnorm(s->xb.f, s->x, w->rms_att, c->dim, c->norm_eps);
        quantize(&s->xb, c->dim, group);
        matmul(s->q, &s->xb, &w->wq);
        matmul(s->k, &s->xb, &w->wk);
        matmul(values + (size_t)pos * c->kv_dim, &s->xb, &w->wv);
        rotate(s->q, c->n_heads, c->head_size, rope);
        rotate(s->k, c->n_kv_heads, c->head_size, rope);
        for (int i = 0; i < c->kv_dim; i++) keys[(size_t)i * s->n_positions + (size_t)pos] = s->k[i];
        attention(s->xb.f, s, c, keys, values, pos);
        quantize(&s->xb, c->dim, group);
        matmul(s->xb2, &s->xb, &w->wo);
        add(s->x, s->xb2, c->dim);

        rmsnorm(s->xb.f, s->x, w->rms_ffn, c->dim, c->norm_eps);
        quantize(&s->xb, c->dim, group);
        matmul(s->hb.f, &s->xb, &w->w1);
        matmul(s->hb2, &s->xb, &w->w3);
        for (int i = 0; i < c->hidden_dim; i++) {  // SwiGLU: silu(w1 x) * w3 x
            float gate = s->hb.f[i];
            s->hb.f[i] = gate * (1.0f / (1.0f + expf(-gate))) * s->hb2[i];
        }
        quantize(&s->hb, c->hidden_dim, group);
        matmul(s->xb2, &s->hb, &w->w2);
        add(s->x, s->xb2, c->dim);
    }
    if (!want_logits) return NULL;
    rmsnorm(s->xb.f, s->x, m->weights.rms_final, c->dim, c->norm_eps);
    quantize(&s->xb, c->dim, group);
    matmul(s->logits, &s->xb, &m->weights.wcls);
    for (int i = 0; i < c->vocab_size; i++) {
        if (!(fabsf(s->logits[i]) <= FLT_MAX)) {
            die(m->path, "the model computes %f for token %d at position %d: its weights are damaged",
                (double)s->logits[i], i, pos);
        }
    }
    return s->logits;
}

// Feeds n tokens from position pos on; returns the last one's logits.
static float *prefill(Model *m, const int *ids, int n, int pos) {
    float *logits = NULL;
    for (int i = 0; i < n; i++) logits = forward(m, ids[i], pos + i, i == n - 1);
    return logits;
}

// ---------------------------------------------------------------------------------------------------------
// Tokenizer: sentencepiece BPE from tokN.bin, with the same ids for every input

typedef struct {
    const char *path;
    File file;              // the pieces' bytes lie here
    int size;
    const unsigned char **piece;  // (size,) not NUL-terminated; a space stands for sentencepiece's U+2581
    int *length;            // (size,)
    float *score;           // (size,) pairs with higher scores are merged first
    int *byte_value;        // (size,) 0 to 255 for pieces like <0x0A>, else -1
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

static int hex_digit(unsigned char c) {
    if (c >= '0' && c <= '9') return c - '0';
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

// The byte a piece like <0x0A> stands for, or -1.
static int parse_byte_piece(const unsigned char *s, int n) {
    if (n != 6 || memcmp(s, "<0x", 3) || s[5] != '>') return -1;
    int high = hex_digit(s[3]), low = hex_digit(s[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

static _Noreturn void bad_tokenizer(const char *path, const File *file, const char *what, int id) {
    if (file->size > 0 && file->data[0] == '\n') {  // how sentencepiece's protobuf starts
        die(path, "this is a sentencepiece model; convert it: "
            "python tokenizer.py --tokenizer-model=%s", path);
    }
    die(path, "not a tokenizer .bin, or damaged: %s (token %d)", what, id);
}

// Walks the entries {float32 score, uint32 length, bytes}: counts them while t->piece is NULL, else stores.
// How many there are is what the file holds: the format does not say.
static int walk_pieces(Tokenizer *t) {
    const File *f = &t->file;
    size_t at = 4;  // skips the longest length, which llama2.c needs and we compute
    int id = 0;
    for (; at < f->size; id++) {
        if (id >= MAX_WIDTH) bad_tokenizer(t->path, f, "too many tokens", id);
        if (f->size - at < 8) bad_tokenizer(t->path, f, "it ends inside a token", id);
        float score = f32_at(f->data + at);
        uint32_t length = (uint32_t)i32_at(f->data + at + 4);
        at += 8;
        if (length > f->size - at) bad_tokenizer(t->path, f, "a length goes beyond its end", id);
        if (length > MAX_WIDTH) bad_tokenizer(t->path, f, "a length is too large", id);
        if (isnan(score)) bad_tokenizer(t->path, f, "a score is not a number", id);
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
    *t = (Tokenizer){.path = path, .file = open_file(path, hint)};
    if (t->file.size < 4) bad_tokenizer(path, &t->file, "too few bytes", 0);
    t->size = walk_pieces(t);
    if (t->size == 0) bad_tokenizer(path, &t->file, "no tokens in it", 0);
    size_t n = (size_t)t->size;
    t->piece = allocate(n, 1, sizeof *t->piece, "the tokenizer");
    t->length = allocate(n, 1, sizeof *t->length, "the tokenizer");
    t->score = allocate(n, 1, sizeof *t->score, "the tokenizer");
    t->byte_value = allocate(n, 1, sizeof *t->byte_value, "the tokenizer");
    walk_pieces(t);

    for (t->mask = 15; t->mask / 2 < n; ) t->mask = t->mask * 2 + 1;
    t->slots = allocate((size_t)t->mask + 1, 1, sizeof *t->slots, "the tokenizer");
    for (uint32_t i = 0; i <= t->mask; i++) t->slots[i] = -1;
    for (int b = 0; b < 256; b++) t->byte_id[b] = -1;
    for (int id = 0; id < t->size; id++) {
        int byte = t->byte_value[id] = parse_byte_piece(t->piece[id], t->length[id]);
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
    void *buffers[] = {t->piece, t->length, t->score, t->byte_value, t->slots};
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
    if (n > (INT_MAX - 64) / 16) die("", "the prompt of %zu bytes is too long", n);
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

// Prints the text of a token. A model may know ids the tokenizer does not: they print nothing.
static void print_token(const Tokenizer *t, int prev, int id) {
    if (id < 0 || id >= t->size) return;
    const unsigned char *s = t->piece[id];
    int n = t->length[id];
    unsigned char byte = (unsigned char)t->byte_value[id];
    if (t->byte_value[id] >= 0) {  // half of an emoji, perhaps: bytes above 127 are printed as they are
        s = &byte;
        n = 1;
    } else if (prev == BOS && n > 0 && s[0] == ' ') {  // the dummy prefix
        s++;
        n--;
    }
    for (int i = 0; i < n; i++) {
        bool control = (s[i] < 32 && !(s[i] >= '\t' && s[i] <= '\r')) || s[i] == 127;
        if (!control) putchar(s[i]);  // no escape sequences on the user's terminal
    }
    check_stdout();
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
    uint64_t rng;
    Candidate *candidates;  // (n,)
} Sampler;

static float random_float(uint64_t *state) {  // in [0, 1), from xorshift64* (Vigna, arXiv 1402.6246)
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)((*state * 0x2545F4914F6CDD1Dull) >> 40) / 16777216.0f;
}

static int argmax(const float *x, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) {
        if (x[i] > x[best]) best = i;
    }
    return best;
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

static int sample_topp(Sampler *s, const float *p, float coin) {
    // what is below this cannot be in the set, whatever the other n - 1 are
    const float cutoff = s->n > 1 ? (1.0f - s->topp) / (float)(s->n - 1) : 0.0f;
    Candidate *c = s->candidates;
    int n = 0;
    for (int i = 0; i < s->n; i++) {
        if (p[i] >= cutoff) c[n++] = (Candidate){p[i], i};
    }
    if (n == 0) return argmax(p, s->n);  // flat probabilities and a tiny topp

    // Heap sort from the most likely on, which stops as soon as topp is reached: the chosen end up, most
    // likely first, at c[n-1], c[n-2], ..., c[n-chosen].
    float sum = 0.0f;
    int chosen = 0;
    for (int i = n / 2 - 1; i >= 0; i--) sift_down(c, i, n);
    while (chosen < n && sum <= s->topp) {
        Candidate best = c[0];
        int last = n - 1 - chosen++;
        c[0] = c[last];
        if (last > 0) sift_down(c, 0, last);
        c[last] = best;
        sum += best.p;
    }
    float target = coin * sum, reached = 0.0f;
    for (int i = 0; i < chosen; i++) {
        reached += c[n - 1 - i].p;
        if (target < reached) return c[n - 1 - i].id;
    }
    return c[n - chosen].id;
}

// Overwrites the logits (n,), which forward() has found to be finite.
static int sample(Sampler *s, float *logits) {
    int best = argmax(logits, s->n);
    // a temperature so low that the division overflows is as good as 0
    if (s->temperature == 0 || !isfinite(logits[best] / s->temperature)) return best;
    for (int i = 0; i < s->n; i++) logits[i] /= s->temperature;
    softmax(logits, s->n);
    float coin = random_float(&s->rng);
    if (s->topp <= 0 || s->topp >= 1) return sample_multinomial(logits, s->n, coin);
    return sample_topp(s, logits, coin);
}

// ---------------------------------------------------------------------------------------------------------
// Generate and chat

typedef struct {
    Model model;
    Tokenizer tokenizer;
    Sampler sampler;
    bool flush_each;  // stdout is a terminal: show each token at once
} Session;

static double now(void) {
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void say(Session *s, int prev, int id) {
    print_token(&s->tokenizer, prev, id);
    if (s->flush_each) flush_stdout();
}

// Encodes text for this model and refuses what it cannot be fed.
static Tokens encode_prompt(const Session *s, const char *text, size_t n) {
    Tokens t = encode(&s->tokenizer, text, n);
    const int vocab_size = s->model.config.vocab_size, seq_len = s->model.config.seq_len;
    for (int i = 0; i < t.n; i++) {
        if (t.ids[i] >= vocab_size) {
            die(s->tokenizer.path, "the prompt needs token %d, but the model has only %d; "
                "use its own tokenizer (-z)", t.ids[i], vocab_size);
        }
    }
    if (t.n > seq_len) {
        die(s->model.path, "the prompt is %d tokens long, but the model's context holds %d", t.n, seq_len);
    }
    return t;
}

static void generate(Session *s, const Text *prompt) {
    Tokens t = encode_prompt(s, prompt->data, prompt->len);
    const int steps = s->model.state.n_positions;
    const int fed = t.n < steps ? t.n : steps;
    int pos = 0, prev = BOS, next = BOS;
    prefill(&s->model, t.ids, 1, 0);
    double start = now();  // llama2.c starts its clock after the first token, too
    float *logits = fed > 1 ? prefill(&s->model, t.ids + 1, fed - 1, 1) : s->model.state.logits;
    if (fed == t.n) next = sample(&s->sampler, logits);  // before the echo: a bad model prints nothing
    for (int i = 1; i < t.n && i <= steps; i++) {
        say(s, prev, t.ids[i]);
        prev = t.ids[i];
    }
    for (pos = fed; next != BOS && next != EOS; pos++) {
        say(s, prev, next);
        if (pos == steps) break;
        logits = forward(&s->model, next, pos, true);
        prev = next;
        next = sample(&s->sampler, logits);
    }
    putchar('\n');
    flush_stdout();
    double seconds = now() - start;
    if (pos > 1 && seconds > 0)  // of the length, BOS and the end token are part
        fprintf(stderr, "achieved tok/s: %f (%d tokens%s)\n", (pos - 1) / seconds, pos + 1,
                next == BOS || next == EOS ? "" : ", cut off");
    free(t.ids);
}

// Prints a question and reads a line of any length, without its newline. False at the end of input.
static bool ask(const char *question, Text *line) {
    int c;
    fputs(question, stdout);
    flush_stdout();
    line->len = 0;
    text_append(line, "", 0);
    while ((c = getchar()) != EOF && c != '\n') text_append(line, &(char){(char)c}, 1);
    return c != EOF || line->len > 0;
}

// One turn in the template Llama 2's chat models were trained with.
static void render_turn(Text *out, const Text *system, const Text *user) {
    out->len = 0;
    text_append(out, "[INST] ", 7);
    if (system->len) {
        text_append(out, "<<SYS>>\n", 8);
        text_append(out, system->data, system->len);
        text_append(out, "\n<</SYS>>\n\n", 11);
    }
    text_append(out, user->data, user->len);
    text_append(out, " [/INST]", 8);
}

// Samples an answer up to its end or the end of the context; returns the next free position.
static int answer(Session *s, const Tokens *t, int pos) {
    const int steps = s->model.state.n_positions;
    int prev = t->ids[t->n - 1];
    int next = sample(&s->sampler, prefill(&s->model, t->ids, t->n, pos));
    pos += t->n;
    fputs("Assistant: ", stdout);
    for (; next != EOS && next != BOS; pos++) {
        say(s, prev, next);
        if (pos == steps) break;
        float *logits = forward(&s->model, next, pos, true);
        prev = next;
        next = sample(&s->sampler, logits);
    }
    if (pos < steps) forward(&s->model, EOS, pos++, false);  // the template closes every answer
    putchar('\n');
    flush_stdout();
    return pos;
}

static void chat(Session *s, const char *first_user, const char *first_system) {
    const int steps = s->model.state.n_positions, seq_len = s->model.config.seq_len;
    Text system = {0}, user = {0}, turn = {0};
    for (int pos = 0, turns = 0; ; turns++) {
        system.len = 0;
        if (turns == 0 && first_system) {
            text_append(&system, first_system, strlen(first_system));
        } else if (turns == 0) {
            ask("Enter system prompt (optional): ", &system);
        }
        if (turns == 0 && first_user) {
            text_append(&user, first_user, strlen(first_user));
        } else if (!ask("User: ", &user)) {
            putchar('\n');
            break;
        }
        render_turn(&turn, &system, &user);
        Tokens t = encode_prompt(s, turn.data, turn.len);
        bool fits = t.n <= steps - pos;
        if (!fits && turns == 0) die("-n", "the first prompt is %d tokens long, more than %d", t.n, steps);
        if (fits) pos = answer(s, &t, pos);
        free(t.ids);
        if (!fits || pos == steps) {
            fprintf(stderr, "run: the context of %d tokens is full, the chat ends here%s\n", steps,
                    steps < seq_len ? " (-n 0 uses all the model has)" : "");
            break;
        }
    }
    flush_stdout();
    free(system.data);
    free(user.data);
    free(turn.data);
}

// --tokens: the prompt's ids on one line
static void print_tokens(const Session *s, const Text *prompt) {
    Tokens t = encode(&s->tokenizer, prompt->data, prompt->len);
    for (int i = 0; i < t.n; i++) printf("%s%d", i ? " " : "", t.ids[i]);
    putchar('\n');
    flush_stdout();
    free(t.ids);
}

// --logits: a line of vocab_size numbers for each position of the prompt
static void print_logits(Session *s, const Text *prompt) {
    Tokens t = encode_prompt(s, prompt->data, prompt->len);
    if (t.n > s->model.state.n_positions) die("-n", "the prompt is %d tokens long, more than -n allows", t.n);
    const int vocab_size = s->model.config.vocab_size;
    for (int pos = 0; pos < t.n; pos++) {
        const float *logits = forward(&s->model, t.ids[pos], pos, true);
        for (int i = 0; i < vocab_size; i++) printf("%s%.9g", i ? " " : "", (double)logits[i]);
        putchar('\n');
    }
    flush_stdout();
    free(t.ids);
}

// ---------------------------------------------------------------------------------------------------------
// Command line
#ifndef TESTING

static const char usage[] =
    "usage: run MODEL.bin [options]\n"
    "example: run out/model.bin -z data/tok4096.bin -i \"Once upon a time\"\n"
    "\n"
    "  -t, --temperature X   0 is greedy, 1 (default) the model's own probabilities\n"
    "  -p, --top-p X         sample from the likeliest tokens that together exceed X, default 0.9;\n"
    "                        0 or 1 is off\n"
    "  -s, --seed N          random seed, default the time; 0 is the time, too\n"
    "  -n, --steps N         tokens to run for, prompt included, default 256; 0 is the whole context\n"
    "  -i, --prompt TEXT     text to continue; - reads it from stdin (less one newline at its end)\n"
    "  -z, --tokenizer FILE  default tokenizer.bin, else data/tokenizer.bin\n"
    "  -m, --mode MODE       generate (default) or chat\n"
    "  -y, --system TEXT     system prompt for chat\n"
    "  -h, --help            this text\n"
    "\n"
    "debugging:\n"
    "  --tokens              print the prompt's token ids and exit\n"
    "  --logits              print all logits for each position of the prompt and exit\n"
    "\n"
    "A value follows its option, or a long one and '=': -t 0.5, --temperature 0.5, --temperature=0.5\n";

typedef struct {
    const char *model, *prompt, *tokenizer, *system;
    float temperature, topp;
    uint64_t seed;
    int steps;
    bool chat, tokens, logits;
} Options;

static float parse_float(const char *flag, const char *text, float max, const char *expected) {
    char *end;
    float value = strtof(text, &end);
    bool number = *text > ' ' && *end == '\0' && isfinite(value);
    if (!number || value < 0 || value > max) die(flag, "expected %s, got '%s'", expected, text);
    return value;
}

static uint64_t parse_integer(const char *flag, const char *text, uint64_t max) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end != '\0' || errno || value > max) {  // strtoull would take " -1"
        die(flag, "expected a whole number from 0 to %llu, got '%s'", (unsigned long long)max, text);
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
        case 'z': o->tokenizer = value; break;
        case 'y': o->system = value; break;
        case 'm':
            o->chat = !strcmp(value, "chat");
            if (!o->chat && strcmp(value, "generate")) die(flag, "expected generate or chat: '%s'", value);
            break;
        case 'T': o->tokens = true; break;
        case 'L': o->logits = true; break;
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
        {'h', false, "--help"}, {'T', false, "--tokens"}, {'L', false, "--logits"},
    };
    const size_t n_known = sizeof known / sizeof *known;
    Options o = {.temperature = 1.0f, .topp = 0.9f, .steps = 256};
    for (int a = 1; a < argc; a++) {
        const char *arg = argv[a];
        if (arg[0] != '-') {
            if (o.model) die(arg, "unexpected argument: the model is already %s", o.model);
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
        if (k == n_known) die(arg, "unknown option; run --help lists all");
        const char *value = equals ? equals + 1 : NULL;
        if (value && !known[k].has_value) die(arg, "this option takes no value");
        if (!value && known[k].has_value && !(value = argv[++a])) die(arg, "needs a value");
        set_option(&o, known[k].key, equals ? known[k].name : arg, value);
    }
    if (!o.model) die("", "no model given; usage: run MODEL.bin [options], run --help lists them");
    return o;
}

static const char *default_tokenizer(void) {
    static const char *const places[] = {"tokenizer.bin", "data/tokenizer.bin"};
    struct stat st;
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        if (stat(places[i], &st) == 0) return places[i];
    }
    die("tokenizer.bin", "not found, nor data/tokenizer.bin; name one with -z FILE, or make one: "
        "python tokenizer.py --tokenizer-model=data/tokenizer.model");
}

static void warn_of_wrong_tokenizer(const Session *s) {
    int vocab_size = s->model.config.vocab_size;
    char likely[64] = "data/tokenizer.bin";
    if (s->tokenizer.size == vocab_size) return;
    if (vocab_size != 32000) snprintf(likely, sizeof likely, "data/tok%d.bin", vocab_size);
    fprintf(stderr, "run: warning: %s holds %d tokens, but the model's vocabulary has %d: try -z %s\n",
            s->tokenizer.path, s->tokenizer.size, vocab_size, likely);
}

static Text read_prompt(const Options *o) {
    Text t = {0};
    if (o->prompt && !strcmp(o->prompt, "-")) {
        t = read_stream(stdin, "stdin");
        if (t.len > 0 && t.data[t.len - 1] == '\n') t.len--;  // echo's
    } else {
        const char *text = o->prompt ? o->prompt : "";
        text_append(&t, text, strlen(text));
    }
    return t;
}

int main(int argc, char **argv) {
#ifdef _WIN32
    _setmode(_fileno(stdin), _O_BINARY);
    _setmode(_fileno(stdout), _O_BINARY);
#else
    signal(SIGPIPE, SIG_IGN);  // a reader that went away is a write error, reported as such
#endif
    Options o = parse_options(argc, argv);
    Session s = {.flush_each = isatty(fileno(stdout))};
    load_model(&s.model, o.model, o.steps);
    load_tokenizer(&s.tokenizer, o.tokenizer ? o.tokenizer : default_tokenizer());
    warn_of_wrong_tokenizer(&s);
    const int vocab_size = s.model.config.vocab_size;
    s.sampler = (Sampler){
        .n = vocab_size, .temperature = o.temperature, .topp = o.topp,
        .rng = o.seed ? o.seed : (uint64_t)time(NULL),  // xorshift never leaves 0
        .candidates = allocate(vocab_size, 1, sizeof(Candidate), "the sampler"),
    };
    if (o.chat && !o.tokens && !o.logits) {
        bool given = o.prompt && strcmp(o.prompt, "-");  // chat reads stdin anyway
        chat(&s, given ? o.prompt : NULL, o.system);
    } else {
        Text prompt = read_prompt(&o);
        if (o.tokens) print_tokens(&s, &prompt);
        else if (o.logits) print_logits(&s, &prompt);
        else generate(&s, &prompt);
        free(prompt.data);
    }
    free(s.sampler.candidates);
    free_tokenizer(&s.tokenizer);
    free_model(&s.model);
    return 0;
}
#endif
