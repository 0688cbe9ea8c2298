/* Numbers to ring words, for one instruction set. Included by quantise.c, which defines NAME,
 * TARGET, HALVES(out, values, count): IEEE half precision to single, and EIGHTS(...): ``words`` for
 * as many multiples of eight as it can, or none; it returns how many.
 *
 * x * factor becomes floor(x * factor + u), u in [0, 1) of 32 bits, with the fraction of x * factor
 * cut to 32 bits, too: whole and fraction are added as integers, or as float64 without any
 * rounding, so all paths give the same bits. Plain loops over blocks that stay in the first cache;
 * the compiler makes vectors of them. */

/* x in units of 2^-32: cut before anything is taken from it, or -2^-60 would leave 1. */
static TARGET ALWAYS_INLINE double NAME(as_double)(double x, uint32_t uniform)
{
    double fine = floor(x), whole = floor(fine * 0x1p-32), fraction = fine - whole * 0x1p32;
    /* a signed conversion, which more machines have */
    double sum = fraction + ((double)(int32_t)(uniform ^ 0x80000000u) + 0x1p31);
    return whole + floor(sum * 0x1p-32);
}

static TARGET ALWAYS_INLINE uint64_t NAME(words)(uint8_t *out, int word_bytes, const void *values,
                                                 int wide, int clips, size_t count,
                                                 const uint32_t *rounding, struct fixed_point to)
{
    const double factor = to.factor * 0x1p32;
    uint64_t clipped = 0;
    size_t done = EIGHTS(out, word_bytes, values, wide, clips, count, rounding, to, &clipped);
    for (size_t i = done; i < count; i++) {
        double x = wide ? ((const double *)values)[i] : (double)((const float *)values)[i];
        if (clips) {
            clipped += (x > to.clip) | (x < -to.clip);
            x = x < to.clip ? x : to.clip;
            x = x > -to.clip ? x : -to.clip;
        }
        x *= factor;
        double rounded = NAME(as_double)(x, rounding[i]);
        rounded = rounded < to.limit ? rounded : to.limit;
        rounded = rounded > -to.limit ? rounded : -to.limit;
        int64_t word = word_bytes == 8 ? (int64_t)rounded : (int32_t)rounded;
        if (word_bytes == 2)
            ((uint16_t *)out)[i] = (uint16_t)word;
        else if (word_bytes == 4)
            ((uint32_t *)out)[i] = (uint32_t)word;
        else
            ((uint64_t *)out)[i] = (uint64_t)word;
    }
    return clipped;
}

static TARGET uint64_t NAME(block)(uint8_t *out, int word_bytes, const void *values, int wide,
                                   size_t count, const uint32_t *rounding, struct fixed_point to)
{
    int clips = to.clip < HUGE_VAL;
#define COPY(bytes, wide, clips) /* of the loop, so that nothing is asked inside */               \
    case 4 * bytes + 2 * wide + clips:                                                             \
        return NAME(words)(out, bytes, values, wide, clips, count, rounding, to);
#define COPIES(bytes) COPY(bytes, 0, 0) COPY(bytes, 0, 1) COPY(bytes, 1, 0) COPY(bytes, 1, 1)
    switch (4 * word_bytes + 2 * wide + clips) {
        COPIES(2)
        COPIES(4)
        COPIES(8)
    }
#undef COPIES
#undef COPY
    return 0;
}

/* The bits of the greatest magnitude: magnitudes compare as their bits do. */
static TARGET uint64_t NAME(greatest)(const uint8_t *values, enum kind kind, size_t count)
{
    uint64_t most = 0;
#define GREATEST(type, magnitude)                                     \
    for (size_t i = 0; i < count; i++) {                              \
        type bits;                                                    \
        memcpy(&bits, values + i * sizeof bits, sizeof bits);         \
        bits &= magnitude;                                            \
        found = bits > found ? bits : found;                          \
    }                                                                 \
    most = found;
    if (kind == FLOAT32) {
        uint32_t found = 0;
        GREATEST(uint32_t, 0x7fffffffu)
    } else if (kind == FLOAT64) {
        uint64_t found = 0;
        GREATEST(uint64_t, 0x7fffffffffffffffu)
    } else {
        uint16_t found = 0;
        GREATEST(uint16_t, 0x7fffu)
    }
#undef GREATEST
    return most;
}

static TARGET void NAME(quantise)(uint8_t *out, int word_bytes, const uint8_t *values,
                                  enum kind kind, size_t count, const uint8_t *rounding,
                                  struct fixed_point to, struct seen *seen)
{
    /* a buffer may lie anywhere in memory: what is not aligned is copied to where it is */
    union { uint64_t align; uint8_t bytes[8 * BLOCK]; } from, into;
    union { uint64_t align; uint8_t bytes[4 * BLOCK]; } bits;
    float singles[BLOCK];
    const size_t item = kind_bytes(kind), word = (size_t)word_bytes;
    const int copies = !aligned(values, item), copies_out = !aligned(out, word);
    const int copies_bits = !aligned(rounding, 4);
    size_t n;
    for (; count; count -= n, values += n * item, rounding += n * 4, out += n * word) {
        n = count < BLOCK ? count : BLOCK;
        const void *numbers = copies ? memcpy(from.bytes, values, n * item) : (const void *)values;
        const void *uniform = copies_bits ? memcpy(bits.bytes, rounding, n * 4)
                                          : (const void *)rounding;
        uint64_t most = NAME(greatest)(numbers, kind, n);
        seen->greatest = most > seen->greatest ? most : seen->greatest;
        if (item == 2) {
            if (kind == FLOAT16)
                HALVES(singles, numbers, n);
            else
                brain_floats(singles, numbers, n);
            numbers = singles;
        }
        seen->clipped += NAME(block)(copies_out ? into.bytes : out, word_bytes, numbers,
                                     kind == FLOAT64, n, uniform, to);
        if (copies_out)
            memcpy(out, into.bytes, n * word);
    }
    if (copies) /* what is left here is an update, its words without a mask, or what rounded them */
        wipe(&from, sizeof from);
    if (copies_out)
        wipe(&into, sizeof into);
    if (copies_bits)
        wipe(&bits, sizeof bits);
    if (item == 2)
        wipe(singles, sizeof singles);
}
