/* A Q-network's passes, written for processors with vectors of 512 bits; agents/passes.py calls them.
 *
 * Each number is computed by one thread in one order, so no result depends on the number of threads.
 */
#include "kernels.h"
#ifdef __AVX512F__
#include <immintrin.h>

#define MOST_CONVOLUTIONS 8
#define MOST_FRAMES 64
#define NEAREST 49152 /* bytes of the nearest cache */
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef struct {
    int64_t height, width, channels; /* of the input, the first layer's as blocks */
    int64_t kernel, stride;
    int64_t down, across, units;     /* of the output */
} Convolution;

typedef struct {
    int64_t convolutions;
    Convolution convolution[MOST_CONVOLUTIONS];
    int64_t stack, block;            /* frames of an observation; pixels of a block's side */
    int64_t flat, hidden, actions;   /* inputs and units of the dense layers */
    int64_t largest;                 /* numbers in the largest of the arrays that scratch holds */
    int64_t scratch;                 /* bytes of a thread's scratch */
} Shape;

typedef struct {
    const int32_t *weight[MOST_CONVOLUTIONS]; /* words (kernel, kernel, channels / pair, units) */
    const float *bias[MOST_CONVOLUTIONS];
    const void *dense;                        /* elements (hidden, flat) */
    const float *dense_bias;
    const float *output, *output_bias;        /* (actions, hidden), (actions) */
    const uint8_t *frames;                    /* (any, height, width) */
    const int64_t *places;                    /* which frames an observation has: place_step numbers further each */
    int64_t place_step, batch;
    int32_t *seen[MOST_CONVOLUTIONS + 1];     /* words (batch / pair, pixels, channels) that a layer saw; NULL: not kept */
    void *flat;                               /* elements (batch, flat) */
    float *hidden, *q_values;                 /* (batch, hidden), (batch, actions) */
} Pass;

typedef struct {
    const int32_t *weight[MOST_CONVOLUTIONS]; /* words (stride, stride, taps, taps, units / pair, channels), kernel turned */
    const float *q_gradient;                  /* (batch, actions) */
    void *hidden;                             /* elements (batch, hidden): the gradient by the dense layer's sums */
    int32_t *hidden_words;                    /* words (batch / pair, hidden): the same */
    float *flat;                              /* (batch, flat): by what it saw */
    int32_t *words[MOST_CONVOLUTIONS];        /* words (batch / pair, pixels, units): by each convolution's sums */
    float *gradient[MOST_CONVOLUTIONS];       /* (kernel, kernel, channels, units): by its weights */
    float *bias_gradient[MOST_CONVOLUTIONS];
} Back;

/* What of the way back is left to do. Two kinds of work go on side by side: convolutions keep a core busy, the dense
 * layer's step the memory, so each thread begins with one of the two and helps with the other. */
typedef struct {
    int64_t next_back, done_back, next_dense, next_kernel;
} Queue;

#define TAKE(counter) __atomic_fetch_add(&queue->counter, 1, __ATOMIC_RELAXED)
#define LEFT(counter, total) (__atomic_load_n(&queue->counter, __ATOMIC_ACQUIRE) < (total))

/* Where and over what sums are taken: at (y, x), `lines` lines of `length` words from y * down_step + x * across_step. */
typedef struct {
    int64_t down, across, down_step, across_step, lines, pitch, length;
} Window;

#define LOW 0
#define PAIR 1
#define ONE 0x3f800000
#define Element float
#define NAME(f) f##_float32
#include "passes.h"
#undef LOW
#undef PAIR
#undef ONE
#undef Element
#undef NAME

#ifdef __AVX512BF16__
static const uint16_t FIRST_OF_PAIRS[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
static const uint16_t LAST_OF_PAIRS[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                           24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
#define LOW 1
#define PAIR 2
#define ONE 0x3f803f80
#define Element uint16_t
#define NAME(f) f##_bfloat16
#include "passes.h"
#endif

int64_t shape_size(void) { return sizeof(Shape); }
int64_t pass_size(void) { return sizeof(Pass); }
int64_t back_size(void) { return sizeof(Back); }
#endif
