/* Vectors of 512 bits for both precisions.
 *
 * A kernel is written once, as an ALWAYS_INLINE function `..._template` whose first argument `precision` is a
 * constant wherever it is called, so the compiler makes one version of it for float32 and one for bfloat16, as of a
 * template. The function without that suffix calls the version for the precision that it is given.
 */
#ifndef SIMD_H
#define SIMD_H
#include "structs.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__BMI2__)
#define VECTOR_KERNELS 1
#include <immintrin.h>
#include "scalar.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")
#define L1_BYTES 49152 /* of the nearest data cache */
#define MAX_TILE 12    /* output positions whose sums stay in registers together */

/* Call the version of a template for `precision`, which is known at run time only. */
#define DISPATCH(precision, function, ...) \
    ((precision) == BFLOAT16 ? function(BFLOAT16, __VA_ARGS__) : function(FLOAT32, __VA_ARGS__))

/* Elements in a word. */
ALWAYS_INLINE int64_t pair_size(const Precision precision) { return precision == BFLOAT16 ? 2 : 1; }

ALWAYS_INLINE int64_t element_bytes(const Precision precision) { return precision == BFLOAT16 ? 2 : 4; }

/* The address of an element, which may be written. */
ALWAYS_INLINE void *element_at(const Precision precision, const void *elements, int64_t index) {
    return (uint8_t *)elements + index * element_bytes(precision);
}

/* A word of ones. */
ALWAYS_INLINE int32_t ones(const Precision precision) { return precision == BFLOAT16 ? 0x3f803f80 : 0x3f800000; }

/* sum[i] + a . b[i], i < 16: `a` and b[i] are words, and pairs are multiplied and summed. */
ALWAYS_INLINE __m512 multiply_add_vectors(const Precision precision, __m512 sum, __m512i a, __m512i b) {
    if (precision == FLOAT32) return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    __builtin_unreachable();
#endif
}

ALWAYS_INLINE __m512 multiply_add(const Precision precision, __m512 sum, int32_t a, __m512i b) {
    return multiply_add_vectors(precision, sum, _mm512_set1_epi32(a), b);
}

/* 16 floats as bfloat16, rounded to nearest, ties to even; the processor's instruction takes denormals as zero. */
ALWAYS_INLINE __m256i round_to_bfloat16(__m512 values) {
#ifdef __AVX512BF16__
    return (__m256i)_mm512_cvtneps_pbh(values);
#else
    (void)values;
    __builtin_unreachable();
#endif
}

/* to_bfloat16 of 16 values, denormals included, each in the lower half of a word. */
ALWAYS_INLINE __m512i to_bfloat16_words(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values), one = _mm512_set1_epi32(1);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), last));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_srli_epi32(even, 16), nan, _mm512_set1_epi32(0x7fc0));
}

/* Words of two vectors of bfloat16, each in the lower half of a word: first[i] | second[i] << 16. */
ALWAYS_INLINE __m512i pair_words(__m512i first, __m512i second) {
    return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}

/* out[i] = values[i] as an element, i < 16. */
ALWAYS_INLINE void store_elements(const Precision precision, void *out, __m512 values) {
    if (precision == BFLOAT16)
        _mm256_storeu_si256((__m256i *)out, round_to_bfloat16(values));
    else
        _mm512_storeu_ps(out, values);
}

/* Store 16 values of each of two observations as words that pair them; where a word is one element, those of the second
 * go to `second_out`, unless NULL. */
ALWAYS_INLINE void store_observations(const Precision precision, int32_t *out, int32_t *second_out, __m512 first,
                                      __m512 second) {
    if (precision == BFLOAT16) {
        const __m512i low = _mm512_cvtepu16_epi32(round_to_bfloat16(first));
        const __m512i high = _mm512_cvtepu16_epi32(round_to_bfloat16(second));
        _mm512_storeu_si512(out, pair_words(low, high));
    } else {
        _mm512_storeu_ps(out, first);
        if (second_out) _mm512_storeu_ps(second_out, second);
    }
}

/* Load 16 words that are used several times. Left to itself, gcc loads them for each use, more than a core can. */
ALWAYS_INLINE __m512i load_once(const int32_t *words) {
    __m512i vector = _mm512_loadu_si512(words);
    __asm__("" : "+v"(vector));
    return vector;
}

/* block[i][j] = block[j][i], i and j < 16. */
ALWAYS_INLINE void transpose_16x16(__m512 *block) {
    UNROLL for (int size = 1; size < 16; size *= 2) {
        /* Blocks of `size` are exchanged across the diagonal: even ones come from the first row, odd from the
         * second. */
        const __m512i each = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __mmask16 odd = _mm512_test_epi32_mask(each, _mm512_set1_epi32(size));
        const __m512i upper = _mm512_mask_add_epi32(each, odd, each, _mm512_set1_epi32(16 - size));
        const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(each, _mm512_set1_epi32(size)), odd, each,
                                                    _mm512_set1_epi32(16));
        UNROLL for (int i = 0; i < 16; i++) {
            if (i & size) continue;
            const __m512 first = block[i], second = block[i + size];
            block[i] = _mm512_permutex2var_ps(first, upper, second);
            block[i + size] = _mm512_permutex2var_ps(first, lower, second);
        }
    }
}

/* Prefetch `count` words that will be read soon, and advance behind them; addresses past the end do no harm. */
static inline void prefetch_words(const int32_t **words, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(*words + i, 0, 2);
    *words += count;
}
#endif
#endif
