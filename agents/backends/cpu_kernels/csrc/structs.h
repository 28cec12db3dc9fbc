/* What the compiled parts share: a layer that is trained, and its step. */
#ifndef KERNELS_H
#define KERNELS_H
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

/* An element of a matrix that is kept in another order lies at place[input] + unit * unit_step; in the second working
 * weight, where units are paired, at place[input] + unit / back_pair * back_unit_step + unit % back_pair. */
typedef struct {
    int64_t units, inputs;          /* of the weight, seen as a matrix */
    int64_t normalized;             /* 1: w = g v / |v|; 0: w is trained, and v stands for it */
    int64_t low;                    /* 1: the working weight is bfloat16, 0: float32 */
    int64_t low_gradient;           /* the same of its gradient and of the bias's */
    int64_t low_kept;               /* the same of the gradient of v */
    int64_t unit_step, gradient_unit_step, back_unit_step, back_pair;
    float factor;                   /* the working weight is w * factor */
    const int32_t *place;           /* of the working weight; NULL: as it is, units one after the other */
    const int32_t *back_place;      /* of the second one */
    const int32_t *gradient_place;  /* of the gradient; NULL likewise */
    float *v, *v_mean, *v_max;      /* trained: values and moments */
    float *g, *g_mean, *g_max;
    float *b, *b_mean, *b_max;
    float *g_gradient;              /* written */
    void *v_gradient;               /* written; NULL: it takes the place of the working weight's, if it has one */
    float *norm;                    /* |v| of each unit */
    void *work, *bias;              /* what the passes compute with; without a bias they take b */
    void *back;                     /* a second working weight for the pass back to a layer's input; may be NULL */
    void *gradient, *bias_gradient; /* of these */
} Layer;

typedef struct {
    float rate, beta1, beta2, eps;
} Adamax;

static inline float widened(uint16_t low) {
    uint32_t bits = (uint32_t)low << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return value != value ? 0x7fc0u : (uint16_t)even;
}

/* Step what is trained of one unit on `row`, the gradient of w in its order, which is overwritten. */
void step_trained(const Layer *layer, int64_t unit, float *row, const Adamax *adamax);
/* By what v is multiplied in the working weight of a unit; leaves |v|. */
float scale_of(const Layer *layer, int64_t unit);
/* Step one unit, as step_trained, and make its working weight anew. */
void step_unit(const Layer *layer, int64_t unit, float *row, const Adamax *adamax);
/* The same on the gradient that lies in the layer; `row` is room for it. */
void step_gathered(const Layer *layer, int64_t unit, float *row, const Adamax *adamax);
/* Write `size` lines of each uint8 frame, from `start` on, as blocks of `size` x `size` pixels: (across, channels). */
void pack_strip(const uint8_t *const *frames, int64_t start, int64_t stack, int64_t width, int64_t size, int64_t low,
                void *packed);
#endif
