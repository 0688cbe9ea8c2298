/* Clip, scale, round at random and wrap: an update's numbers become words of a ring, in one pass. */
#include "kernel.h"

#include <math.h>
#include <string.h>

#define BLOCK 512
#define ALWAYS_INLINE inline __attribute__((always_inline))

size_t kind_bytes(enum kind kind)
{
    static const size_t bytes[KINDS] = {2, 4, 8, 2};
    return bytes[kind];
}

static ALWAYS_INLINE int aligned(const void *at, size_t size)
{
    return (uintptr_t)at % size == 0;
}

static ALWAYS_INLINE void brain_floats(float *out, const uint16_t *values, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)values[i] << 16;
        memcpy(out + i, &bits, sizeof bits);
    }
}

/* Half precision without an instruction for it. Source: IEEE 754-2019, section 3.4. */
static void portable_halves(float *out, const uint16_t *values, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        uint32_t sign = (uint32_t)(values[i] & 0x8000u) << 16, exponent = values[i] >> 10 & 31;
        uint32_t fraction = values[i] & 0x3ffu, bits;
        if (exponent == 0) { /* fraction * 2^-24 */
            float tiny = (float)fraction * 0x1p-24f;
            memcpy(&bits, &tiny, sizeof bits);
        } else {
            bits = (exponent == 31 ? 255u : exponent + 112u) << 23 | fraction << 13;
        }
        bits |= sign;
        memcpy(out + i, &bits, sizeof bits);
    }
}

#define TARGET
#define NAME(name) portable_##name
#define HALVES portable_halves
#define EIGHTS(...) 0
#include "quantise_path.h"
static const struct numbers portable_numbers = {portable_quantise, portable_greatest};
#undef TARGET
#undef NAME
#undef HALVES
#undef EIGHTS

#ifdef HAVE_AES
#include <immintrin.h>

/* The conversion takes halves for what they are, even where the thread flushes denormals. */
static __attribute__((target("avx2,f16c"))) void converted_halves(float *out,
                                                                  const uint16_t *values,
                                                                  size_t count)
{
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(out + i,
                         _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(values + i))));
    portable_halves(out + i, values + i, count - i);
}

#define TARGET __attribute__((target("avx2")))
#define NAME(name) avx2_##name
#define HALVES converted_halves
#define EIGHTS(...) 0
#include "quantise_path.h"
static const struct numbers avx2_numbers = {avx2_quantise, avx2_greatest};
#undef TARGET
#undef NAME
#undef EIGHTS

#ifdef __clang__ /* it would take no notice of any of them */
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif

/* Words of 16 and 32 bits: |x * factor| < 2^31, so whole and fraction are one integer of 64. */
static TARGET ALWAYS_INLINE size_t eights(uint8_t *out, int word_bytes, const void *values, int wide,
                                          int clips, size_t count, const uint32_t *rounding,
                                          struct fixed_point to, uint64_t *clipped)
{
    size_t i = 0;
    const __m512d factor = _mm512_set1_pd(to.factor * 0x1p32), clip = _mm512_set1_pd(to.clip);
    const __m512d least = _mm512_set1_pd(-to.clip);
    const __m512i most = _mm512_set1_epi64((long long)to.limit);
    const __m512i negative = _mm512_set1_epi64(-(long long)to.limit);
    if (word_bytes == 8)
        return 0;
    for (; i + 8 <= count; i += 8) {
        __m512d x = wide ? _mm512_loadu_pd((const double *)values + i)
                         : _mm512_cvtps_pd(_mm256_loadu_ps((const float *)values + i));
        if (clips) {
            __mmask8 over = _mm512_cmp_pd_mask(x, clip, _CMP_GT_OQ);
            over |= _mm512_cmp_pd_mask(x, least, _CMP_LT_OQ);
            *clipped += (uint64_t)__builtin_popcount(over);
            x = _mm512_max_pd(_mm512_min_pd(x, clip), least);
        }
        __m512i uniform = _mm512_cvtepu32_epi64(_mm256_loadu_si256((const void *)(rounding + i)));
        __m512i word = _mm512_cvt_roundpd_epi64(_mm512_mul_pd(x, factor),
                                                _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
        word = _mm512_srai_epi64(_mm512_add_epi64(word, uniform), 32);
        word = _mm512_max_epi64(_mm512_min_epi64(word, most), negative);
        if (word_bytes == 4)
            _mm256_storeu_si256((void *)((uint32_t *)out + i), _mm512_cvtepi64_epi32(word));
        else
            _mm_storeu_si128((void *)((uint16_t *)out + i), _mm512_cvtepi64_epi16(word));
    }
    return i;
}

#define NAME(name) avx512_##name
#define EIGHTS eights
#include "quantise_path.h"
static const struct numbers avx512_numbers = {avx512_quantise, avx512_greatest};
#undef TARGET
#undef NAME
#undef HALVES
#undef EIGHTS

#endif

void find_numbers(const struct numbers *found[LOOPS])
{
#ifdef HAVE_AES
    const unsigned wide = HAS_AVX2 | HAS_F16C, wider = wide | HAS_AVX512;
    if ((cpu_features() & wider) == wider)
        *found++ = &avx512_numbers;
    if ((cpu_features() & wide) == wide)
        *found++ = &avx2_numbers;
#endif
    *found = &portable_numbers;
}
