/* What the parts of the kernel know of each other. Theory and sources: ../native.py. */
#ifndef SECAGG_KERNEL_H
#define SECAGG_KERNEL_H

#include <stddef.h>
#include <stdint.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define HAVE_AES 1
#endif

enum { ROUND_KEYS = 11, BLOCK_BYTES = 16, KEY_BYTES = 16 };

/* Instruction sets that AES runs on, the fastest last. */
enum path { AES_NI, VAES_256, VAES_512, PATHS };

/* What is done to words: FILL overwrites them, the others add or subtract. */
enum op { FILL, ADD_16, ADD_32, ADD_64, SUBTRACT_16, SUBTRACT_32, SUBTRACT_64, ADD_Q, SUBTRACT_Q };

/* Blocks whose counters differ in the last byte alone. */
enum { GROUP = 256 };

/* A key made ready: its round keys, and what the last byte of a counter does to the state after
 * two rounds (see expand.c). */
struct stream_key {
    uint8_t rounds[ROUND_KEYS][BLOCK_BYTES];
    uint8_t low[GROUP][BLOCK_BYTES];
};

/* Bytes of a keystream that this kernel makes: byte 10 of a counter stays zero. */
#define STREAM_BYTES ((uint64_t)1 << 44)

/* Z_q for a prime q just below 2^54; q = 0 where the ring is Z_{2^w}. */
struct prime {
    uint64_t q;
    uint64_t excess; /* 2^54 - q */
};

/* Apply the keystream of one key, from a byte on that begins a word, to memory of any alignment. */
typedef void apply_fn(uint8_t *out, size_t bytes, const struct stream_key *key, uint64_t from,
                      enum op op, struct prime prime);

/* What ``cpu_features`` finds: bits. */
enum { HAS_AES = 1, HAS_AVX2 = 2, HAS_F16C = 4, HAS_VAES = 8, HAS_AVX512 = 16 };
unsigned cpu_features(void);

int path_supported(enum path path);
apply_fn *path_apply(enum path path);
void make_ready(struct stream_key *ready, const uint8_t key[KEY_BYTES]);
void reduce_words(uint8_t *words, size_t bytes, struct prime prime);
void wipe(void *memory, size_t bytes);

/* Number formats of an update. */
enum kind { FLOAT16, FLOAT32, FLOAT64, BFLOAT16, KINDS };

struct fixed_point {
    double clip;   /* magnitude that elements are cut to; infinite for none */
    double factor; /* what an element is multiplied by, in float64 */
    double limit;  /* magnitude that no integer exceeds */
};

/* What was seen of the elements: the bits of the greatest magnitude, and how many were cut. */
struct seen {
    uint64_t greatest;
    uint64_t clipped;
};

/* The loops over numbers, for one instruction set. */
struct numbers {
    void (*quantise)(uint8_t *out, int word_bytes, const uint8_t *values, enum kind kind,
                     size_t count, const uint8_t *rounding, struct fixed_point to,
                     struct seen *seen);
    uint64_t (*greatest)(const uint8_t *values, enum kind kind, size_t count);
};

enum { LOOPS = 3 };

/* The sets of loops that run here, the best first, the portable one last, then NULL. */
void find_numbers(const struct numbers *found[LOOPS]);
size_t kind_bytes(enum kind kind);

#endif
