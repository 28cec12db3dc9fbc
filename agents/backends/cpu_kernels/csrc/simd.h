/* Vectors of 512, 256 or 128 bits, and the operations on them that the kernels of both precisions are written with.
 *
 * A kernel is written once, as an ALWAYS_INLINE function `..._template` whose first argument `precision` is a
 * constant wherever it is called, so the compiler makes one version of it for float32 and one for bfloat16, as of a
 * template. The function without that suffix calls the version for the precision that it is given.
 *
 * Floats and Words are the compiler's own vector types (gcc, clang), as wide as the registers of the processor that is
 * compiled for: VECTOR_LANES is 16 with AVX-512, 8 with AVX2 and FMA, 4 with NEON or SSE2. Layouts do not depend on
 * it: channels come by 16, which is VECTORS vectors. bfloat16 needs AVX512-BF16, so 16 lanes.
 *
 * What is equal for every width, bit for bit: every sum of the convolutions and of the hidden layer, and of the
 * gradients by their weights and inputs. Lanes lie along outputs, or a dot product is kept in 16 partial sums whatever
 * the width (dense_forward.c), so each number is added in the same order; products are added with one rounding (fused)
 * on all of them but SSE2, which has no such instruction. Not equal: loops that the compiler vectorizes by itself
 * (the output layer's Q-values, optimizer.c), whose partial sums and rounding are its choice.
 */
#ifndef SIMD_H
#define SIMD_H
#include "structs.h"
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__BMI2__)
#define VECTOR_LANES 16
#define VECTOR_REGISTERS 32
#elif defined(__AVX2__) && defined(__FMA__)
#define VECTOR_LANES 8
#define VECTOR_REGISTERS 16
#elif defined(__aarch64__)
#define VECTOR_LANES 4
#define VECTOR_REGISTERS 32
#elif defined(__SSE2__)
#define VECTOR_LANES 4
#define VECTOR_REGISTERS 16
#endif
#ifdef VECTOR_LANES
#define VECTOR_KERNELS 1
#ifdef __aarch64__
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif
#include "scalar.h"

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")
#define VECTORS (16 / VECTOR_LANES) /* that hold 16 numbers */
#define MAX_TILE 12                 /* output positions whose sums stay in registers together */

/* Tiles: as many sums as fit the registers beside what they are multiplied by, and as few loads for them as possible.
 * With 512-bit vectors some kernels have tiles for 64 and 32 channels too. */
#if VECTOR_LANES == 16
#define L1_BYTES 49152           /* of the nearest data cache */
#define TILE_POSITIONS 12        /* of a convolution, for 16 channels */
#define OUTER_ROWS 8             /* input channels of a weight's gradient, for 16 output channels; divides 16 */
#define STEP_ROWS 8              /* hidden units of the hidden layer's gradient, for 3 vectors of inputs; divides 8 */
#define DOT_UNITS 4              /* of the hidden layer's forward pass; divides 16 */
#define DOT_OBSERVATIONS 6       /* the same */
#define FLAT_OBSERVATIONS 8      /* of the gradient by the hidden layer's input */
#define FLAT_VECTORS 2           /* the same */
#elif VECTOR_LANES == 8
#define L1_BYTES 32768
#define TILE_POSITIONS 6
#define OUTER_ROWS 4
#define STEP_ROWS 4
#define DOT_UNITS 2
#define DOT_OBSERVATIONS 3
#define FLAT_OBSERVATIONS 6
#define FLAT_VECTORS 2
#elif VECTOR_REGISTERS == 32
#define L1_BYTES 32768
#define TILE_POSITIONS 6
#define OUTER_ROWS 4
#define STEP_ROWS 8
#define DOT_UNITS 2
#define DOT_OBSERVATIONS 3
#define FLAT_OBSERVATIONS 6
#define FLAT_VECTORS 4
#else
#define L1_BYTES 32768
#define TILE_POSITIONS 3
#define OUTER_ROWS 2
#define STEP_ROWS 4
#define DOT_UNITS 1
#define DOT_OBSERVATIONS 3
#define FLAT_OBSERVATIONS 3
#define FLAT_VECTORS 4
#endif

typedef float Floats __attribute__((vector_size(4 * VECTOR_LANES)));
typedef int32_t Words __attribute__((vector_size(4 * VECTOR_LANES)));
/* The same in memory, at any address. */
typedef float FloatsInMemory __attribute__((vector_size(4 * VECTOR_LANES), aligned(4), may_alias));
typedef int32_t WordsInMemory __attribute__((vector_size(4 * VECTOR_LANES), aligned(4), may_alias));

/* Call the version of a template for `precision`, which is known at run time only. */
#ifdef __AVX512BF16__
#define DISPATCH(precision, function, ...) \
    ((precision) == BFLOAT16 ? function(BFLOAT16, __VA_ARGS__) : function(FLOAT32, __VA_ARGS__))
#else
#define DISPATCH(precision, function, ...) ((void)(precision), function(FLOAT32, __VA_ARGS__))
#endif

/* Elements in a word. */
ALWAYS_INLINE int64_t pair_size(const Precision precision) { return precision == BFLOAT16 ? 2 : 1; }

ALWAYS_INLINE int64_t element_bytes(const Precision precision) { return precision == BFLOAT16 ? 2 : 4; }

/* The address of an element, which may be written. */
ALWAYS_INLINE void *element_at(const Precision precision, const void *elements, int64_t index) {
    return (uint8_t *)elements + index * element_bytes(precision);
}

/* A word of ones. */
ALWAYS_INLINE int32_t ones(const Precision precision) { return precision == BFLOAT16 ? 0x3f803f80 : 0x3f800000; }

ALWAYS_INLINE Floats load_floats(const void *values) { return *(const FloatsInMemory *)values; }
ALWAYS_INLINE void store_floats(void *out, Floats values) { *(FloatsInMemory *)out = values; }
ALWAYS_INLINE Words load_words(const void *words) { return *(const WordsInMemory *)words; }
ALWAYS_INLINE void store_words(void *out, Words words) { *(WordsInMemory *)out = words; }
ALWAYS_INLINE Floats zeros(void) { return (Floats){0.0f}; }

/* The same number in all lanes. */
ALWAYS_INLINE Words broadcast_word(int32_t word) { return (Words){0} + word; }
ALWAYS_INLINE Floats broadcast_float(float value) {
    int32_t word;
    memcpy(&word, &value, 4);
    return (Floats)broadcast_word(word);
}

/* values[i] where mask[i] is -1, +0 where it is 0. */
ALWAYS_INLINE Floats keep_where(Words mask, Floats values) { return (Floats)((Words)values & mask); }

/* The ReLU; NaN stays NaN, and -0 becomes +0. */
ALWAYS_INLINE Floats relu(Floats values) { return keep_where(~(Words)(values <= zeros()), values); }

/* sum[i] + a[i] * b[i], rounded once where the processor can. By its name: left to itself gcc makes two instructions of
 * it for some processors. */
ALWAYS_INLINE Floats fused_multiply_add(Floats sum, Floats a, Floats b) {
#if VECTOR_LANES == 16
    return _mm512_fmadd_ps(a, b, sum);
#elif VECTOR_LANES == 8
    return _mm256_fmadd_ps(a, b, sum);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}

/* sum[i] + a[i] . b[i]: a[i] and b[i] are words, and pairs are multiplied and summed. */
ALWAYS_INLINE Floats multiply_add_vectors(const Precision precision, Floats sum, Words a, Words b) {
    if (precision == FLOAT32) return fused_multiply_add(sum, (Floats)a, (Floats)b);
#ifdef __AVX512BF16__
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    __builtin_unreachable();
#endif
}

ALWAYS_INLINE Floats multiply_add(const Precision precision, Floats sum, int32_t a, Words b) {
    return multiply_add_vectors(precision, sum, broadcast_word(a), b);
}

/* Load words that are used several times. Left to itself, gcc loads them for each use, more than a core can. */
ALWAYS_INLINE Words load_once(const int32_t *words) {
    Words vector = load_words(words);
#if VECTOR_LANES == 16
    __asm__("" : "+v"(vector));
#elif VECTOR_LANES == 8
    __asm__("" : "+x"(vector));
#elif defined(__aarch64__)
    __asm__("" : "+w"(vector));
#endif /* SSE2 has no registers left for them */
    return vector;
}

/* out[i] = values[i] for 16 numbers in VECTORS vectors. */
ALWAYS_INLINE void store_16(float *out, const Floats *values) {
    UNROLL for (int v = 0; v < VECTORS; v++) store_floats(out + VECTOR_LANES * v, values[v]);
}

/* The sum of 16 numbers that lie in VECTORS vectors: numbers 8 apart are added first, then 4, 2 and 1 apart. */
ALWAYS_INLINE float sum_of_16(const Floats *parts) {
#if VECTOR_LANES == 16
    return _mm512_reduce_add_ps(parts[0]);
#else
    float sums[16];
    store_16(sums, parts);
    UNROLL for (int apart = 8; apart; apart /= 2) {
        UNROLL for (int i = 0; i < apart; i++) sums[i] += sums[i + apart];
    }
    return sums[0];
#endif
}

/* block[i][j] = block[j][i], i and j < 16, for rows of VECTORS vectors. */
ALWAYS_INLINE void transpose_16x16(Floats (*block)[VECTORS]) {
#if VECTOR_LANES == 16
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
            const Floats first = block[i][0], second = block[i + size][0];
            block[i][0] = _mm512_permutex2var_ps(first, upper, second);
            block[i + size][0] = _mm512_permutex2var_ps(first, lower, second);
        }
    }
#else
    float *values = (float *)block;
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < i; j++) {
            const float value = values[16 * i + j];
            values[16 * i + j] = values[16 * j + i];
            values[16 * j + i] = value;
        }
    }
#endif
}

/* out[i] = values[i] as an element: bfloat16 is rounded to nearest, ties to even, and the processor's instruction takes
 * denormals as zero. */
ALWAYS_INLINE void store_elements(const Precision precision, void *out, Floats values) {
#ifdef __AVX512BF16__
    if (precision == BFLOAT16) {
        _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(values));
        return;
    }
#endif
    (void)precision;
    store_floats(out, values);
}

#ifdef __AVX512BF16__
/* 16 floats as bfloat16, each in the lower half of a word; as store_elements. */
ALWAYS_INLINE __m512i round_to_bfloat16_words(__m512 values) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values));
}

/* to_bfloat16 of 16 values, denormals included, each in the lower half of a word. */
ALWAYS_INLINE __m512i to_bfloat16_words(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values), one = _mm512_set1_epi32(1);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), last));
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_srli_epi32(even, 16), nan, _mm512_set1_epi32(0x7fc0));
}

ALWAYS_INLINE __m512i load_bfloat16_words(const uint16_t *values) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)values));
}

/* Words of two vectors of bfloat16, each in the lower half of a word: first[i] | second[i] << 16. */
ALWAYS_INLINE __m512i pair_words(__m512i first, __m512i second) {
    return _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
}
#endif

/* Store a vector of each of two observations as words that pair them; where a word is one element, those of the second
 * go to `second_out`, unless NULL. */
ALWAYS_INLINE void store_observations(const Precision precision, int32_t *out, int32_t *second_out, Floats first,
                                      Floats second) {
#ifdef __AVX512BF16__
    if (precision == BFLOAT16) {
        const __m512i low = round_to_bfloat16_words(first), high = round_to_bfloat16_words(second);
        _mm512_storeu_si512(out, pair_words(low, high));
        return;
    }
#endif
    (void)precision;
    store_floats(out, first);
    if (second_out) store_floats(second_out, second);
}

/* Tell the core that the thread waits for another. */
ALWAYS_INLINE void spin_pause(void) {
#ifdef __aarch64__
    __asm__ volatile("yield");
#else
    _mm_pause();
#endif
}

/* Prefetch `count` words that will be read soon, and advance behind them; addresses past the end do no harm. */
static inline void prefetch_words(const int32_t **words, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(*words + i, 0, 2);
    *words += count;
}
#endif
#endif
