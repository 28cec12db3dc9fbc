/* Whether there is a tile unit, its configuration, and the plain C that stands in for it. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* syscall */
#endif
#include "tiles.h"
#include <stdlib.h>
#if defined(TILE_KERNELS) && !defined(TILE_STAND_IN)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if !defined(TILE_KERNELS)
int64_t has_tile_unit(void) { return 0; }
void configure_tiles(void) {}
void release_tiles(void) {}
#elif !defined(TILE_STAND_IN)

/* Whether the processor has the unit, the operating system keeps its state, and grants it to this process. */
int64_t has_tile_unit(void) {
    enum { AMX_BF16 = 1 << 22, AMX_TILE = 1 << 24, OSXSAVE = 1 << 27, TILE_STATES = 3 << 17 };
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned eax, ebx, ecx, edx, enabled, high;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & OSXSAVE)) return 0;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
    if (!(edx & AMX_TILE) || !(edx & AMX_BF16)) return 0;
    __asm__ volatile("xgetbv" : "=a"(enabled), "=d"(high) : "c"(0));
    if ((enabled & TILE_STATES) != TILE_STATES) return 0;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* Configure the calling thread's unit: eight tiles of 16 rows of 64 bytes, all zero. */
void configure_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } __attribute__((aligned(64))) config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
}

/* Give the calling thread's unit back as if it had never been used: others, say oneDNN, configure it for themselves. */
void release_tiles(void) { __asm__ volatile("tilerelease" ::); }
#else

static _Thread_local struct {
    int configured;
    float tile[8][16][16];
} unit;

/* Threads that have configured their unit and not released it. */
int64_t configured_threads = 0;

int64_t has_tile_unit(void) { return 1; }

void configure_tiles(void) {
    if (unit.configured) abort(); /* a kernel's caller has forgotten to release it */
    memset(&unit, 0, sizeof unit);
    unit.configured = 1;
    __atomic_fetch_add(&configured_threads, 1, __ATOMIC_RELAXED);
}

void release_tiles(void) {
    if (!unit.configured) abort();
    unit.configured = 0;
    __atomic_fetch_sub(&configured_threads, 1, __ATOMIC_RELAXED);
}

/* What the processor answers with an invalid opcode. */
static void check_configured(void) {
    if (!unit.configured) abort();
}

void zero_tile(int tile) {
    check_configured();
    memset(unit.tile[tile], 0, sizeof unit.tile[tile]);
}

void load_tile(int tile, const void *base, int64_t stride) {
    check_configured();
    for (int64_t row = 0; row < 16; row++) memcpy(unit.tile[tile][row], (const uint8_t *)base + row * stride, 64);
}

void store_tile(int tile, void *base, int64_t stride) {
    check_configured();
    for (int64_t row = 0; row < 16; row++) memcpy((uint8_t *)base + row * stride, unit.tile[tile][row], 64);
}

/* Denormals become zeros of the same sign. */
static inline float flushed(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits &= bits & 0x7f800000u ? ~0u : 0x80000000u;
    memcpy(&value, &bits, 4);
    return value;
}

/* for m, n: sums[m][n] += (sum over k: a[m][k][0] * b[k][n][0]) + (sum over k: a[m][k][1] * b[k][n][1])
 * in float32, each product added with one rounding, to nearest. */
void multiply_tiles(int sums, int a, int b) {
    check_configured();
    float first[16][16], second[16][16];
    uint32_t words[16][16], row[16];
    memcpy(words, unit.tile[b], sizeof words);
    for (int k = 0; k < 16; k++) {
        for (int n = 0; n < 16; n++) {
            first[k][n] = flushed(from_bfloat16((uint16_t)words[k][n]));
            second[k][n] = flushed(from_bfloat16((uint16_t)(words[k][n] >> 16)));
        }
    }
    for (int m = 0; m < 16; m++) {
        float of_first[16] = {0.0f}, of_second[16] = {0.0f};
        memcpy(row, unit.tile[a][m], sizeof row);
        for (int k = 0; k < 16; k++) {
            const float x = flushed(from_bfloat16((uint16_t)row[k]));
            const float y = flushed(from_bfloat16((uint16_t)(row[k] >> 16)));
            for (int n = 0; n < 16; n++) {
                of_first[n] = flushed(__builtin_fmaf(x, first[k][n], of_first[n]));
                of_second[n] = flushed(__builtin_fmaf(y, second[k][n], of_second[n]));
            }
        }
        for (int n = 0; n < 16; n++) {
            const float both = flushed(of_first[n] + of_second[n]);
            unit.tile[sums][m][n] = flushed(flushed(unit.tile[sums][m][n]) + both);
        }
    }
}
#endif
