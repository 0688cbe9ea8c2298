/* AES-128-CTR fused with the ring's addition, for one width of registers. Included once a path by
 * expand.c, which defines NAME, TARGET, VEC, LANES (blocks in a register) and the operations.
 *
 * UNROLL independent registers hide the latency of an AES round; the round keys of the widest path
 * stay in registers, too. A stride never crosses a group of counters. */

#define UNROLL 8
#define STRIDE (UNROLL * LANES * BLOCK_BYTES)

/* The vector of keystream words as residues mod q, with those that are none drawn again. */
static TARGET ALWAYS_INLINE VEC NAME(residues)(VEC stream, const struct stream_key *key,
                                               uint64_t block, struct prime prime)
{
    VEC residues = SHIFT_RIGHT_64(stream, 10);
    if (UNLIKELY(ANY_NOT_BELOW(residues, prime.q))) {
        uint64_t words[2 * LANES];
        STORE(words, residues);
        for (int i = 0; i < 2 * LANES; i++)
            if (words[i] >= prime.q)
                words[i] = redraw(key, 2 * block + (uint64_t)i, prime.q);
        residues = LOAD(words);
    }
    return residues;
}

static TARGET ALWAYS_INLINE VEC NAME(combine)(VEC words, VEC stream, enum op op,
                                              const struct stream_key *key, uint64_t block,
                                              struct prime prime)
{
    switch (op) {
    case FILL: return stream;
    case ADD_16: return ADD16(words, stream);
    case ADD_32: return ADD32(words, stream);
    case ADD_64: return ADD64(words, stream);
    case SUBTRACT_16: return SUB16(words, stream);
    case SUBTRACT_32: return SUB32(words, stream);
    case SUBTRACT_64: return SUB64(words, stream);
    case ADD_Q: return ADD64(words, NAME(residues)(stream, key, block, prime));
    case SUBTRACT_Q: /* as q - residue, at most q: one more term of the lazy sum */
        words = ADD64(words, SET64(prime.q));
        return SUB64(words, NAME(residues)(stream, key, block, prime));
    }
    return words;
}

/* Whole strides only, from a block on that begins one. */
static TARGET ALWAYS_INLINE void NAME(strides)(uint8_t *out, size_t count,
                                               const struct stream_key *key, uint64_t block,
                                               enum op op, struct prime prime)
{
    VEC round_key[ROUND_KEYS], high = ZERO;
    for (int r = 3; r < ROUND_KEYS; r++)
        round_key[r] = BROADCAST(_mm_loadu_si128((const __m128i *)key->rounds[r]));
    for (size_t s = 0; s < count; s++, out += STRIDE, block += UNROLL * LANES) {
        size_t low = (size_t)(block % GROUP);
        if (s == 0 || low == 0)
            high = BROADCAST(first_rounds(key, 0, block - low, 2));
        VEC state[UNROLL];
        for (int i = 0; i < UNROLL; i++)
            state[i] = XOR(high, LOAD(key->low[low + (size_t)(i * LANES)]));
        for (int r = 3; r < ROUND_KEYS - 1; r++)
            for (int i = 0; i < UNROLL; i++)
                state[i] = AES_ROUND(state[i], round_key[r]);
        for (int i = 0; i < UNROLL; i++) {
            uint8_t *at = out + i * LANES * BLOCK_BYTES;
            VEC stream = AES_LAST(state[i], round_key[ROUND_KEYS - 1]);
            VEC words = op == FILL ? stream : LOAD(at);
            STORE(at, NAME(combine)(words, stream, op, key, block + (uint64_t)(i * LANES), prime));
        }
    }
}

/* Part of one stride: all of it is made, and what is wanted applied. */
static TARGET void NAME(part)(uint8_t *out, size_t bytes, const struct stream_key *key,
                              uint64_t from, enum op op, struct prime prime)
{
    uint8_t stream[STRIDE];
    size_t skip = (size_t)(from % STRIDE);
    if (!bytes)
        return;
    NAME(strides)(stream, 1, key, (from - skip) / BLOCK_BYTES, FILL, prime);
    apply_words(out, stream + skip, bytes, key, from, op, prime);
    wipe(stream, sizeof stream);
}

static TARGET void NAME(apply)(uint8_t *out, size_t bytes, const struct stream_key *key,
                               uint64_t from, enum op op, struct prime prime)
{
    size_t head = (size_t)(-from % STRIDE);
    head = head < bytes ? head : bytes;
    NAME(part)(out, head, key, from, op, prime);
    out += head, bytes -= head, from += head;
    size_t count = bytes / STRIDE, done = count * STRIDE;
    uint64_t block = from / BLOCK_BYTES;
#define COPY(op) /* of the loop, so that nothing is asked inside */               \
    case op: NAME(strides)(out, count, key, block, op, prime); break;
    switch (op) {
        COPY(FILL)
        COPY(ADD_16)
        COPY(ADD_32)
        COPY(ADD_64)
        COPY(SUBTRACT_16)
        COPY(SUBTRACT_32)
        COPY(SUBTRACT_64)
        COPY(ADD_Q)
        COPY(SUBTRACT_Q)
    }
#undef COPY
    NAME(part)(out + done, bytes - done, key, from + done, op, prime);
}

#undef UNROLL
#undef STRIDE
