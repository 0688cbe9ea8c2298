/* AES-128-CTR keystreams, applied to the words of a ring as they are made.
 *
 * Two rounds of ten are saved. Byte 15 of the counter is mixed with bytes 0, 5 and 10 alone in the
 * first round, and these are zero up to the 2^40th block; so in the second round it acts on the
 * state through one column, all the others through the others, and between them is only a sum:
 *
 *     state2(block) = state2(block with byte 15 zero) + low[byte 15],   low = state2(b) + state2(0)
 *
 * The 256 entries of ``low`` depend on the key alone, and are read in the order of the counter.
 * Source: Bernstein and Schwabe, New AES software speed records, INDOCRYPT 2008 (ePrint 2008/381),
 * section 4 (counter-mode caching, which they credit to Hongjun Wu).
 *
 * No index and no branch depends on a key or on a keystream, but for the words that are no residue
 * mod q: one in 2^37, and thrown away. */
#include "kernel.h"

#include <string.h>

void wipe(void *memory, size_t bytes)
{
    memset(memory, 0, bytes);
#ifdef __GNUC__
    __asm__ volatile("" : : "r"(memory) : "memory"); /* somebody may read it: it stays */
#endif
}

#ifdef HAVE_AES
#include <immintrin.h>

#define ALWAYS_INLINE inline __attribute__((always_inline))
#define UNLIKELY(x) __builtin_expect(!!(x), 0)
#define AES_TARGET __attribute__((target("aes,ssse3,sse4.1")))

static const uint8_t BYTES_REVERSED[16] = {15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0};

/* Source: FIPS 197, section 5.2; Intel, AES New Instructions white paper, Fig. 24. */
static AES_TARGET ALWAYS_INLINE __m128i next_key(__m128i key, __m128i assist)
{
    assist = _mm_shuffle_epi32(assist, 0xff);
    key = _mm_xor_si128(key, _mm_slli_si128(key, 4));
    key = _mm_xor_si128(key, _mm_slli_si128(key, 8));
    return _mm_xor_si128(key, assist);
}

static AES_TARGET void expand_key(struct stream_key *ready, const uint8_t key[KEY_BYTES])
{
    __m128i at = _mm_loadu_si128((const __m128i *)key);
    _mm_storeu_si128((__m128i *)ready->rounds[0], at);
#define STEP(r, constant)                                             \
    at = next_key(at, _mm_aeskeygenassist_si128(at, constant));       \
    _mm_storeu_si128((__m128i *)ready->rounds[r], at);
    STEP(1, 0x01) STEP(2, 0x02) STEP(3, 0x04) STEP(4, 0x08) STEP(5, 0x10)
    STEP(6, 0x20) STEP(7, 0x40) STEP(8, 0x80) STEP(9, 0x1b) STEP(10, 0x36)
#undef STEP
}

/* The counter is stream << 64 | block, big-endian (NIST SP 800-38A, section 6.5). */
static AES_TARGET ALWAYS_INLINE __m128i first_rounds(const struct stream_key *key, uint64_t stream,
                                                     uint64_t block, int rounds)
{
    __m128i counter = _mm_set_epi64x((long long)stream, (long long)block);
    __m128i turn = _mm_loadu_si128((const __m128i *)BYTES_REVERSED);
    const __m128i *round_key = (const __m128i *)key->rounds;
    __m128i state = _mm_xor_si128(_mm_shuffle_epi8(counter, turn), _mm_loadu_si128(round_key));
    for (int r = 1; r <= rounds; r++)
        state = _mm_aesenc_si128(state, _mm_loadu_si128(round_key + r));
    return state;
}

static AES_TARGET void one_block(uint8_t out[BLOCK_BYTES], const struct stream_key *key,
                                 uint64_t stream, uint64_t block)
{
    __m128i state = first_rounds(key, stream, block, ROUND_KEYS - 2);
    __m128i last = _mm_loadu_si128((const __m128i *)key->rounds[ROUND_KEYS - 1]);
    _mm_storeu_si128((__m128i *)out, _mm_aesenclast_si128(state, last));
}

AES_TARGET void make_ready(struct stream_key *ready, const uint8_t key[KEY_BYTES])
{
    expand_key(ready, key);
    __m128i zero = first_rounds(ready, 0, 0, 2);
    for (uint64_t b = 0; b < GROUP; b++)
        _mm_storeu_si128((__m128i *)ready->low[b],
                         _mm_xor_si128(first_rounds(ready, 0, b, 2), zero));
}

/* The residue at a coordinate whose word in the first stream is none: from the next streams. */
static uint64_t redraw(const struct stream_key *key, uint64_t coordinate, uint64_t q)
{
    for (uint64_t stream = 1;; stream++) {
        uint64_t words[2];
        one_block((uint8_t *)words, key, stream, coordinate / 2);
        uint64_t residue = words[coordinate % 2] >> 10;
        if (residue < q)
            return residue;
    }
}

/* Words before the first whole stride and after the last. */
static void apply_words(uint8_t *out, const uint8_t *stream, size_t bytes,
                        const struct stream_key *key, uint64_t from, enum op op,
                        struct prime prime)
{
#define EACH(type, expression)                                        \
    for (size_t i = 0; i < bytes; i += sizeof(type)) {                \
        type word, other;                                             \
        memcpy(&word, out + i, sizeof word);                          \
        memcpy(&other, stream + i, sizeof other);                     \
        word = (type)(expression);                                    \
        memcpy(out + i, &word, sizeof word);                          \
    }                                                                 \
    break;
#define RESIDUE                                                       \
    ((other >> 10) < prime.q ? other >> 10 : redraw(key, (from + i) / 8, prime.q))
    switch (op) {
    case FILL: memcpy(out, stream, bytes); break;
    case ADD_16: EACH(uint16_t, word + other)
    case ADD_32: EACH(uint32_t, word + other)
    case ADD_64: EACH(uint64_t, word + other)
    case SUBTRACT_16: EACH(uint16_t, word - other)
    case SUBTRACT_32: EACH(uint32_t, word - other)
    case SUBTRACT_64: EACH(uint64_t, word - other)
    case ADD_Q: EACH(uint64_t, word + RESIDUE)
    case SUBTRACT_Q: EACH(uint64_t, word + prime.q - RESIDUE)
    }
#undef RESIDUE
#undef EACH
}

#define TARGET AES_TARGET
#define NAME(name) aes_ni_##name
#define VEC __m128i
#define LANES 1
#define LOAD(p) _mm_loadu_si128((const __m128i *)(p))
#define STORE(p, v) _mm_storeu_si128((__m128i *)(p), v)
#define BROADCAST(block) (block)
#define ZERO _mm_setzero_si128()
#define XOR _mm_xor_si128
#define AES_ROUND _mm_aesenc_si128
#define AES_LAST _mm_aesenclast_si128
#define ADD16 _mm_add_epi16
#define ADD32 _mm_add_epi32
#define ADD64 _mm_add_epi64
#define SUB16 _mm_sub_epi16
#define SUB32 _mm_sub_epi32
#define SUB64 _mm_sub_epi64
#define SET64(x) _mm_set1_epi64x((long long)(x))
#define SHIFT_RIGHT_64 _mm_srli_epi64
/* words below 2^54: the sign of word - q says which is less, without a 64-bit comparison */
#define ANY_NOT_BELOW(v, q) (_mm_movemask_pd(_mm_castsi128_pd(SUB64(v, SET64(q)))) != 3)
#include "expand_path.h"
#include "expand_undef.h"

#define TARGET __attribute__((target("vaes,avx2,aes,ssse3,sse4.1")))
#define NAME(name) vaes_256_##name
#define VEC __m256i
#define LANES 2
#define LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define STORE(p, v) _mm256_storeu_si256((__m256i *)(p), v)
#define BROADCAST _mm256_broadcastsi128_si256
#define ZERO _mm256_setzero_si256()
#define XOR _mm256_xor_si256
#define AES_ROUND _mm256_aesenc_epi128
#define AES_LAST _mm256_aesenclast_epi128
#define ADD16 _mm256_add_epi16
#define ADD32 _mm256_add_epi32
#define ADD64 _mm256_add_epi64
#define SUB16 _mm256_sub_epi16
#define SUB32 _mm256_sub_epi32
#define SUB64 _mm256_sub_epi64
#define SET64(x) _mm256_set1_epi64x((long long)(x))
#define SHIFT_RIGHT_64 _mm256_srli_epi64
#define ANY_NOT_BELOW(v, q) (_mm256_movemask_pd(_mm256_castsi256_pd(SUB64(v, SET64(q)))) != 15)
#include "expand_path.h"
#include "expand_undef.h"

#define TARGET __attribute__((target("vaes,avx512f,avx512bw,avx2,aes,ssse3,sse4.1")))
#define NAME(name) vaes_512_##name
#define VEC __m512i
#define LANES 4
#define LOAD(p) _mm512_loadu_si512(p)
#define STORE(p, v) _mm512_storeu_si512(p, v)
#define BROADCAST _mm512_broadcast_i32x4
#define ZERO _mm512_setzero_si512()
#define XOR _mm512_xor_si512
#define AES_ROUND _mm512_aesenc_epi128
#define AES_LAST _mm512_aesenclast_epi128
#define ADD16 _mm512_add_epi16
#define ADD32 _mm512_add_epi32
#define ADD64 _mm512_add_epi64
#define SUB16 _mm512_sub_epi16
#define SUB32 _mm512_sub_epi32
#define SUB64 _mm512_sub_epi64
#define SET64(x) _mm512_set1_epi64((long long)(x))
#define SHIFT_RIGHT_64 _mm512_srli_epi64
#define ANY_NOT_BELOW(v, q) (_mm512_cmpge_epu64_mask(v, SET64(q)) != 0)
#include "expand_path.h"
#include "expand_undef.h"

int path_supported(enum path path)
{
    static const unsigned wanted[PATHS] = {
        HAS_AES,
        HAS_AES | HAS_AVX2 | HAS_VAES,
        HAS_AES | HAS_AVX2 | HAS_VAES | HAS_AVX512,
    };
    return (cpu_features() & wanted[path]) == wanted[path];
}

apply_fn *path_apply(enum path path)
{
    static apply_fn *const all[PATHS] = {aes_ni_apply, vaes_256_apply, vaes_512_apply};
    return all[path];
}

#else

int path_supported(enum path path)
{
    (void)path;
    return 0;
}

apply_fn *path_apply(enum path path)
{
    (void)path;
    return NULL;
}

void make_ready(struct stream_key *ready, const uint8_t key[KEY_BYTES])
{
    (void)ready, (void)key;
}

#endif

/* x mod 2^54 + floor(x / 2^54) * excess < 2q, then once more by q.
 * Source: Menezes, van Oorschot and Vanstone, Handbook of Applied Cryptography, section 14.3.4. */
void reduce_words(uint8_t *words, size_t bytes, struct prime prime)
{
    const uint64_t low = ((uint64_t)1 << 54) - 1;
    for (size_t i = 0; i < bytes; i += 8) {
        uint64_t x;
        memcpy(&x, words + i, sizeof x);
        x = (x & low) + (uint64_t)(uint32_t)(x >> 54) * (uint32_t)prime.excess;
        uint64_t less = x - prime.q;
        x = less < x ? less : x;
        memcpy(words + i, &x, sizeof x);
    }
}
