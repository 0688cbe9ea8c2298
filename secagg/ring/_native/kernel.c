/* The extension module: arguments in, the loops without the GIL, a result out.
 *
 * Called by ../native.py alone, which checks arrays; what is checked here is what memory safety
 * needs. Of CPython's API the limited one of 3.11 (setup.py): one binary serves all later ones. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>

#include "kernel.h"

/* Tiles stay in the first cache while every key passes over them. */
#define TILE_BYTES ((size_t)16384)
#define LAZY_TERMS 1024
/* How much of the next tile is fetched beside each mask. */
#define AHEAD_BYTES 1024

static const struct numbers *numbers[LOOPS];

static PyObject *supported(PyObject *self, PyObject *args)
{
    int path;
    (void)self;
    if (!PyArg_ParseTuple(args, "i", &path))
        return NULL;
    return PyBool_FromLong(path >= 0 && path < PATHS && path_supported((enum path)path));
}

static int right_loops(int loops)
{
    return loops >= 0 && loops < LOOPS && numbers[loops];
}

/* Everything that a path or a set of loops can be asked to do. */
static void try_path(enum path path)
{
    struct stream_key ready;
    uint8_t out[4096] = {0}, key[KEY_BYTES] = {0};
    const struct prime prime = {(1ull << 54) - 1, 1};
    make_ready(&ready, key);
    for (int op = FILL; op <= SUBTRACT_Q; op++)
        path_apply(path)(out + 8, sizeof out - 16, &ready, 8, (enum op)op, prime);
    reduce_words(out, sizeof out, prime);
}

static void try_loops(const struct numbers *loops)
{
    uint8_t out[8 * 70], values[8 * 70] = {0}, rounding[4 * 70] = {0};
    struct seen seen = {0, 0};
    for (int kind = 0; kind < KINDS; kind++) {
        loops->greatest(values, (enum kind)kind, 70);
        for (int word_bytes = 2; word_bytes <= 8; word_bytes *= 2)
            for (int clips = 0; clips < 2; clips++)
                loops->quantise(out, word_bytes, values, (enum kind)kind, 70, rounding,
                                (struct fixed_point){clips ? 1 : HUGE_VAL, 1, 1}, &seen);
    }
}

static sigjmp_buf before_fault;
static pthread_t trying;
static struct sigaction others;

static void faulted(int signal)
{
    if (pthread_equal(trying, pthread_self()))
        siglongjmp(before_fault, 1);
    sigaction(signal, &others, NULL); /* another thread's own: it faults again, as it would have */
}

static PyObject *faults(PyObject *self, PyObject *args)
{
    int path, loops, on_purpose;
    struct sigaction ours;
    volatile int fault = 1;
    (void)self;
    if (!PyArg_ParseTuple(args, "iip", &path, &loops, &on_purpose))
        return NULL;
    if (path < 0 || path >= PATHS || !right_loops(loops) ||
        (path > 0 && !path_supported((enum path)path)))
        return PyErr_Format(PyExc_ValueError, "no such path here");
    memset(&ours, 0, sizeof ours);
    ours.sa_handler = faulted;
    sigemptyset(&ours.sa_mask);
    trying = pthread_self();
    sigaction(SIGILL, &ours, &others);
    if (sigsetjmp(before_fault, 1) == 0) {
        if (on_purpose)
            raise(SIGILL);
        if (path_supported((enum path)path))
            try_path((enum path)path);
        try_loops(numbers[loops]);
        fault = 0;
    }
    sigaction(SIGILL, &others, NULL);
    return PyBool_FromLong(fault);
}

static enum op op_of(int word_bytes, uint64_t q, int add)
{
    if (q)
        return add ? ADD_Q : SUBTRACT_Q;
    switch (word_bytes) {
    case 2: return add ? ADD_16 : SUBTRACT_16;
    case 4: return add ? ADD_32 : SUBTRACT_32;
    default: return add ? ADD_64 : SUBTRACT_64;
    }
}

/* What every tile of a vector gets. */
struct masks {
    apply_fn *apply;
    const struct stream_key *keys;
    const uint8_t *signs;
    size_t count;
    int word_bytes;
    struct prime prime;
};

/* Memory that the next tile needs: fetched while the processor is busy with this one. */
struct ahead {
    const uint8_t *at, *end;
};

#ifdef __GNUC__
#define FETCH(address) __builtin_prefetch(address, 1, 2)
#else
#define FETCH(address) (void)(address)
#endif

static void fetch(struct ahead *ahead, size_t bytes)
{
    for (; bytes >= 64 && ahead->at < ahead->end; ahead->at += 64, bytes -= 64)
        FETCH(ahead->at);
}

static void mask_tile(uint8_t *out, size_t bytes, uint64_t from, const struct masks *masks,
                      struct ahead ahead[2])
{
    int terms = 1;
    for (size_t k = 0; k < masks->count; k++) {
        if (masks->prime.q && terms++ == LAZY_TERMS) {
            reduce_words(out, bytes, masks->prime);
            terms = 2;
        }
        enum op op = op_of(masks->word_bytes, masks->prime.q, masks->signs[k]);
        masks->apply(out, bytes, masks->keys + k, from, op, masks->prime);
        fetch(ahead, AHEAD_BYTES);
        fetch(ahead + 1, AHEAD_BYTES);
    }
    if (masks->prime.q)
        reduce_words(out, bytes, masks->prime);
}

/* Bytes from here to the end of a tile: tiles begin at multiples of their size in the stream, so
 * that only the first and the last of a range are cut. */
static size_t tile_left(uint64_t from, size_t bytes, size_t tile)
{
    size_t left = tile - (size_t)(from % tile);
    return left < bytes ? left : bytes;
}

static int right_masks(struct masks *masks, int path, const Py_buffer *keys,
                       const Py_buffer *signs, int word_bytes, uint64_t q)
{
    size_t count = (size_t)signs->len;
    if (path < 0 || path >= PATHS || !path_supported((enum path)path) ||
        (word_bytes != 2 && word_bytes != 4 && word_bytes != 8) ||
        (size_t)keys->len != count * sizeof(struct stream_key) ||
        (q && (word_bytes != 8 || q >= 1ull << 54 || (1ull << 54) - q >= 1ull << 20)))
        return 0;
    *masks = (struct masks){path_apply((enum path)path), keys->buf, signs->buf, count,
                            word_bytes, {q, (1ull << 54) - q}};
    return 1;
}

/* Whether words from a coordinate on are within a stream. */
static int within_stream(uint64_t start, size_t bytes, size_t word_bytes)
{
    return bytes % word_bytes == 0 && start <= STREAM_BYTES / word_bytes &&
           bytes <= STREAM_BYTES - start * word_bytes;
}

/* All buffers of a call, released on every way out. */
static void release(Py_buffer *buffers, size_t count)
{
    while (count--)
        PyBuffer_Release(buffers + count);
}

static PyObject *refuse(Py_buffer *buffers, size_t count, const char *call)
{
    release(buffers, count);
    return PyErr_Format(PyExc_ValueError, "arguments of %s", call);
}

static PyObject *make_keys_ready(PyObject *self, PyObject *args)
{
    Py_buffer in[2]; /* out, keys */
    (void)self;
    if (!PyArg_ParseTuple(args, "w*y*", in, in + 1))
        return NULL;
    size_t count = (size_t)in[1].len / KEY_BYTES;
    if (count * KEY_BYTES != (size_t)in[1].len || !path_supported(AES_NI) ||
        count * sizeof(struct stream_key) != (size_t)in[0].len)
        return refuse(in, 2, "ready");
    Py_BEGIN_ALLOW_THREADS
    for (size_t k = 0; k < count; k++)
        make_ready((struct stream_key *)in[0].buf + k, (uint8_t *)in[1].buf + k * KEY_BYTES);
    Py_END_ALLOW_THREADS
    release(in, 2);
    Py_RETURN_NONE;
}

static PyObject *expand(PyObject *self, PyObject *args)
{
    Py_buffer in[3]; /* out, keys, signs */
    int path, word_bytes;
    unsigned long long start, q;
    struct masks masks;
    (void)self;
    if (!PyArg_ParseTuple(args, "iw*iKKy*y*", &path, in, &word_bytes, &q, &start, in + 1, in + 2))
        return NULL;
    if (!right_masks(&masks, path, in + 1, in + 2, word_bytes, q) ||
        !within_stream(start, (size_t)in[0].len, (size_t)word_bytes))
        return refuse(in, 3, "expand");
    Py_BEGIN_ALLOW_THREADS
    uint8_t *out = in[0].buf;
    size_t bytes = (size_t)in[0].len;
    uint64_t from = start * (uint64_t)word_bytes;
    for (size_t n; bytes; out += n, bytes -= n, from += n) {
        n = tile_left(from, bytes, TILE_BYTES);
        struct ahead ahead[2] = {{out + n, out + n + tile_left(from + n, bytes - n, TILE_BYTES)}};
        mask_tile(out, n, from, &masks, ahead);
    }
    Py_END_ALLOW_THREADS
    release(in, 3);
    Py_RETURN_NONE;
}

static PyObject *fill(PyObject *self, PyObject *args)
{
    Py_buffer in[2]; /* out, key */
    int path;
    unsigned long long start;
    (void)self;
    if (!PyArg_ParseTuple(args, "iw*Ky*", &path, in, &start, in + 1))
        return NULL;
    if (path < 0 || path >= PATHS || !path_supported((enum path)path) ||
        (size_t)in[1].len != sizeof(struct stream_key) ||
        !within_stream(start, (size_t)in[0].len, 1))
        return refuse(in, 2, "fill");
    Py_BEGIN_ALLOW_THREADS
    path_apply((enum path)path)(in[0].buf, (size_t)in[0].len, in[1].buf, start, FILL,
                                (struct prime){0, 0});
    Py_END_ALLOW_THREADS
    release(in, 2);
    Py_RETURN_NONE;
}

static int right_numbers(int kind, int word_bytes, const Py_buffer *out, const Py_buffer *values,
                         struct fixed_point to)
{
    return kind >= 0 && kind < KINDS && (word_bytes == 2 || word_bytes == 4 || word_bytes == 8) &&
           out->len % word_bytes == 0 &&
           (size_t)(out->len / word_bytes) * kind_bytes((enum kind)kind) == (size_t)values->len &&
           to.clip >= 0 && to.limit >= 0 && to.limit < (word_bytes == 8 ? 0x1p62 : 0x1p31);
}

static PyObject *seen_of(struct seen seen)
{
    return Py_BuildValue("KK", (unsigned long long)seen.greatest, (unsigned long long)seen.clipped);
}

static PyObject *encode(PyObject *self, PyObject *args)
{
    Py_buffer in[5]; /* out, values, rounding key, keys, signs */
    int path, loops, word_bytes, kind;
    unsigned long long start;
    struct fixed_point to;
    struct masks masks;
    struct seen seen = {0, 0};
    (void)self;
    if (!PyArg_ParseTuple(args, "iiw*iKy*idddy*y*y*", &path, &loops, in, &word_bytes, &start, in + 1, &kind,
                          &to.clip, &to.factor, &to.limit, in + 2, in + 3, in + 4))
        return NULL;
    if (!right_masks(&masks, path, in + 3, in + 4, word_bytes, 0) ||
        !right_loops(loops) || !right_numbers(kind, word_bytes, in, in + 1, to) ||
        (size_t)in[2].len != sizeof(struct stream_key) ||
        !within_stream(start, (size_t)in[0].len, (size_t)word_bytes) ||
        !within_stream(start, (size_t)in[0].len / (size_t)word_bytes * 4, 4))
        return refuse(in, 5, "encode");
    Py_BEGIN_ALLOW_THREADS
    uint32_t uniform[TILE_BYTES / 8]; /* elements of a tile of the widest words */
    uint8_t *out = in[0].buf;
    const uint8_t *values = in[1].buf;
    size_t count = (size_t)in[0].len / (size_t)word_bytes, item = kind_bytes((enum kind)kind);
    for (size_t n; count; count -= n, values += n * item, out += n * (size_t)word_bytes, start += n) {
        n = tile_left(start, count, TILE_BYTES / 8);
        masks.apply((uint8_t *)uniform, 4 * n, in[2].buf, 4 * start, FILL, masks.prime);
        numbers[loops]->quantise(out, word_bytes, values, (enum kind)kind, n,
                                 (const uint8_t *)uniform, to, &seen);
        const size_t size = (size_t)word_bytes, next = tile_left(start + n, count - n, TILE_BYTES / 8);
        struct ahead ahead[2] = {
            {values + n * item, values + (n + next) * item},
            {out + n * size, out + (n + next) * size},
        };
        mask_tile(out, n * size, start * (uint64_t)word_bytes, &masks, ahead);
    }
    wipe(uniform, sizeof uniform);
    Py_END_ALLOW_THREADS
    release(in, 5);
    return seen_of(seen);
}

static PyObject *to_words(PyObject *self, PyObject *args)
{
    Py_buffer in[3]; /* out, values, rounding */
    int loops, word_bytes, kind;
    struct fixed_point to;
    struct seen seen = {0, 0};
    (void)self;
    if (!PyArg_ParseTuple(args, "iw*iy*idddy*", &loops, in, &word_bytes, in + 1, &kind, &to.clip,
                          &to.factor, &to.limit, in + 2))
        return NULL;
    if (!right_loops(loops) || !right_numbers(kind, word_bytes, in, in + 1, to) ||
        in[2].len != in[0].len / word_bytes * 4)
        return refuse(in, 3, "to_words");
    Py_BEGIN_ALLOW_THREADS
    numbers[loops]->quantise(in[0].buf, word_bytes, in[1].buf, (enum kind)kind,
                             (size_t)in[0].len / (size_t)word_bytes, in[2].buf, to, &seen);
    Py_END_ALLOW_THREADS
    release(in, 3);
    return seen_of(seen);
}

static PyObject *greatest(PyObject *self, PyObject *args)
{
    Py_buffer in[1]; /* values */
    int loops, kind;
    uint64_t most = 0;
    (void)self;
    if (!PyArg_ParseTuple(args, "iy*i", &loops, in, &kind))
        return NULL;
    if (!right_loops(loops) || kind < 0 || kind >= KINDS ||
        (size_t)in[0].len % kind_bytes((enum kind)kind))
        return refuse(in, 1, "greatest");
    Py_BEGIN_ALLOW_THREADS
    most = numbers[loops]->greatest(in[0].buf, (enum kind)kind,
                                    (size_t)in[0].len / kind_bytes((enum kind)kind));
    Py_END_ALLOW_THREADS
    release(in, 1);
    return PyLong_FromUnsignedLongLong(most);
}

static PyMethodDef methods[] = {
    {"supported", supported, METH_VARARGS, NULL},
    {"faults", faults, METH_VARARGS, NULL},
    {"make_ready", make_keys_ready, METH_VARARGS, NULL},
    {"expand", expand, METH_VARARGS, NULL},
    {"fill", fill, METH_VARARGS, NULL},
    {"encode", encode, METH_VARARGS, NULL},
    {"to_words", to_words, METH_VARARGS, NULL},
    {"greatest", greatest, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int set_up(PyObject *module)
{
    find_numbers(numbers);
    long sets = 0;
    while (sets < LOOPS && numbers[sets])
        sets++;
    if (PyModule_AddIntConstant(module, "INTERFACE", 1) != 0 || /* native.py asks for it */
        PyModule_AddIntConstant(module, "LOOPS", sets) != 0)
        return -1;
    return PyModule_AddIntConstant(module, "KEY_BYTES", (long)sizeof(struct stream_key));
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, (void *)set_up},
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "kernel", NULL, 0, methods, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_kernel(void)
{
    return PyModuleDef_Init(&definition);
}
