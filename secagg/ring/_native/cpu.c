/* What the processor has and the system keeps over a change of threads.
 *
 * Asked of CPUID itself: what compilers know by name depends on their version.
 * Source: Intel SDM, volume 2A, CPUID; volume 1, section 13.3 (XCR0). */
#include "kernel.h"

#ifdef HAVE_AES
#include <cpuid.h>

static unsigned bits(unsigned word, unsigned mask)
{
    return (word & mask) == mask;
}

static unsigned kept_registers(void)
{
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static unsigned ask(void)
{
    unsigned a, b, c, d, found = 0, kept = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return 0;
    if (bits(c, 1u << 9 | 1u << 19 | 1u << 25)) /* SSSE3, SSE4.1, AES */
        found |= HAS_AES;
    if (bits(c, 1u << 27 | 1u << 28)) /* OSXSAVE, AVX */
        kept = kept_registers();
    unsigned halves = bits(c, 1u << 29); /* F16C */
    if (!bits(kept, 6) || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !bits(b, 1u << 5))
        return found;
    found |= HAS_AVX2 | (halves ? HAS_F16C : 0) | (bits(c, 1u << 9) ? HAS_VAES : 0);
    if (bits(kept, 0xe6) && bits(b, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31)) /* F, DQ, BW, VL */
        found |= HAS_AVX512;
    return found;
}

/* Asked once, at import: under a hypervisor CPUID takes as long as a tile. */
unsigned cpu_features(void)
{
    static unsigned found, asked;
    if (!asked)
        found = ask(), asked = 1;
    return found;
}

#else

unsigned cpu_features(void)
{
    return 0;
}

#endif
