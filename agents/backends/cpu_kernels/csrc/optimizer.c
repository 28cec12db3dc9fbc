/* From a packed weight's gradient to the next packed weight: the parameterization's gradient, the optimizer,
 * packing.
 *
 * Each unit (a row of the weight) is computed by one thread in one order, so no result depends on the number of
 * threads.
 */
#include "optimizer.h"
#include <math.h>
#include "scalar.h"
#include "spectral_norm.h"
#include "weight_norm.h"

/* A value after one step; its moments are updated. With d the gradient and epsilon where torch has it:
 * Adamax (Kingma & Ba 2015, algorithm 2):
 *     m = beta1 m + (1 - beta1) d;  u = max(beta2 u, |d| + eps);  value -= step_size m / u
 * Adam (the same, algorithm 1):
 *     m = beta1 m + (1 - beta1) d;  u = beta2 u + (1 - beta2) d^2;  value -= step_size m / (correction sqrt(u) + eps)
 * RMSProp (Mnih et al. 2015):
 *     m, u as with Adam;  value -= step_size d / sqrt(max(u - m^2, 0) + eps) */
static inline __attribute__((always_inline)) float step_value(const OptimizerKind kind, float value, float gradient,
                                                              float *moment1, float *moment2, OptimizerStep step) {
    const float m = *moment1 + (1.0f - step.beta1) * (gradient - *moment1);
    *moment1 = m;
    if (kind == ADAMAX) {
        const float decayed = step.beta2 * *moment2, size = fabsf(gradient) + step.eps;
        const float u = decayed > size ? decayed : size; /* a NaN gradient gives NaN */
        *moment2 = u;
        return value - step.step_size * (m / u);
    }
    const float u = step.beta2 * *moment2 + (1.0f - step.beta2) * (gradient * gradient);
    *moment2 = u;
    if (kind == ADAM) return value - step.step_size * (m / (step.correction * sqrtf(u) + step.eps));
    const float variance = u - m * m; /* of a constant gradient rounding can make it negative */
    return value - step.step_size * (gradient / sqrtf((variance < 0.0f ? 0.0f : variance) + step.eps));
}

/* step_value of `count` values, and in `gradient` the gradient: row_factor * gradient + v_factor * value. */
static inline __attribute__((always_inline)) void step_values_template(const OptimizerKind kind, float *value,
                                                                       float *gradient, float *moment1,
                                                                       float *moment2, int64_t count,
                                                                       float row_factor, float v_factor,
                                                                       const OptimizerStep *given) {
    const OptimizerStep step = *given;
#pragma omp simd
    for (int64_t i = 0; i < count; i++) {
        const float d = row_factor * gradient[i] + v_factor * value[i];
        gradient[i] = d;
        value[i] = step_value(kind, value[i], d, moment1 + i, moment2 + i, step);
    }
}

static void step_values(float *value, float *gradient, float *moment1, float *moment2, int64_t count, float row_factor,
                        float v_factor, const OptimizerStep *step) {
    if (step->kind == ADAMAX)
        step_values_template(ADAMAX, value, gradient, moment1, moment2, count, row_factor, v_factor, step);
    else if (step->kind == ADAM)
        step_values_template(ADAM, value, gradient, moment1, moment2, count, row_factor, v_factor, step);
    else
        step_values_template(RMSPROP_MNIH, value, gradient, moment1, moment2, count, row_factor, v_factor, step);
}

/* One step of a single value. */
static float step_one(float value, float gradient, float *moment1, float *moment2, const OptimizerStep *step) {
    if (step->kind == ADAMAX) return step_value(ADAMAX, value, gradient, moment1, moment2, *step);
    if (step->kind == ADAM) return step_value(ADAM, value, gradient, moment1, moment2, *step);
    return step_value(RMSPROP_MNIH, value, gradient, moment1, moment2, *step);
}

/* The step of a tensor whose gradient somebody else computed. Parts are as large as a step of a layer takes them. */
void step_tensor(float *value, const float *gradient, float *moment1, float *moment2, int64_t count, int64_t threads,
                 const OptimizerStep *step) {
    enum { PART = 4096 };
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t from = 0; from < count; from += PART) {
        const int64_t size = count - from < PART ? count - from : PART;
        float part[PART];
        memcpy(part, gradient + from, size * sizeof(float));
        step_values(value + from, part, moment1 + from, moment2 + from, size, 1.0f, 0.0f, step);
    }
}

/* packed[start + offset[i]] = v[i] * scale for one unit; without `offset` packed[start + i]. */
static inline void write_packed(void *packed, const int32_t *offset, int64_t start, int64_t bfloat16, const float *v,
                                int64_t inputs, float scale) {
    if (bfloat16) {
        uint16_t *out = (uint16_t *)packed + start;
        if (offset) {
            for (int64_t i = 0; i < inputs; i++) out[offset[i]] = to_bfloat16(v[i] * scale);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) out[i] = to_bfloat16(v[i] * scale);
        }
    } else {
        float *out = (float *)packed + start;
        if (offset) {
            for (int64_t i = 0; i < inputs; i++) out[offset[i]] = v[i] * scale;
        } else {
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) out[i] = v[i] * scale;
        }
    }
}

#define LANES 64

/* The dot product of a and b, in lanes that do not wait for each other. Not inlined: the same instructions, so the same
 * rounding, after a step and after a resume. */
__attribute__((noinline)) float dot(const float *a, const float *b, int64_t count) {
    float lanes[LANES] = {0.0f}, sum = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
#pragma omp simd
        for (int64_t j = 0; j < LANES; j++) lanes[j] += a[i + j] * b[i + j];
    }
    for (; i < count; i++) sum += a[i] * b[i];
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < LANES; j++) sum += lanes[j];
    return sum;
}

/* The scale of a unit with a length of its own, for the kinds that have one. */
static inline float unit_scale(const TrainedLayer *layer, int64_t unit) {
    return layer->weight_kind == WEIGHT_NORM_EXP ? expf(layer->g[unit]) : layer->g[unit];
}

/* The factor that makes a unit's packed weight of v: input_scale, times g / |v| with weight norm or g where |v| = 1.
 * Writes norm = |v| with weight norm. */
__attribute__((noinline)) float packed_scale(const TrainedLayer *layer, int64_t unit) {
    const int64_t inputs = layer->inputs;
    const float *v = layer->v + unit * inputs;
    switch (layer->weight_kind) {
        case WEIGHT_NORM:
        case WEIGHT_NORM_EXP:
            layer->norm[unit] = sqrtf(dot(v, v, inputs));
            return layer->input_scale * (unit_scale(layer, unit) / layer->norm[unit]);
        case WEIGHT_UNIT_SCALED: return layer->input_scale * layer->g[unit];
        case WEIGHT_SPECTRAL: return layer->input_scale * (layer->c[unit] / *layer->sigma);
        default: return layer->input_scale;
    }
}

/* Make a unit's packed weights and bias from v, g and b:
 * for i: packed[packed_offset[i] + unit * packed_unit_stride] = v[unit][i] * packed_scale;  the same transposed */
static void pack_unit(const TrainedLayer *layer, int64_t unit) {
    const int64_t inputs = layer->inputs;
    const float *v = layer->v + unit * inputs, scale = packed_scale(layer, unit);
    write_packed(layer->packed, layer->packed_offset, unit * layer->packed_unit_stride, layer->packed_bfloat16, v,
                 inputs, scale);
    if (layer->transposed) {
        const int64_t start =
            unit / layer->transposed_pair * layer->transposed_unit_stride + unit % layer->transposed_pair;
        write_packed(layer->transposed, layer->transposed_offset, start, layer->packed_bfloat16, v, inputs, scale);
    }
    if (layer->packed_bias && layer->packed_bfloat16)
        ((uint16_t *)layer->packed_bias)[unit] = to_bfloat16(layer->b[unit]);
    else if (layer->packed_bias)
        ((float *)layer->packed_bias)[unit] = layer->b[unit];
}

/* Make the packed weights of all layers, after something else has changed v, g or b. */
void pack_layers(const TrainedLayer *layers, int64_t count, int64_t threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t l = 0; l < count; l++) {
        if (layers[l].weight_kind == WEIGHT_SPECTRAL) find_singular_vectors(&layers[l], 0);
#pragma omp for schedule(static) nowait
        for (int64_t unit = 0; unit < layers[l].units; unit++) pack_unit(&layers[l], unit);
    }
}

/* Before a training pass: the steps of power iteration, and the packed weights that depend on them. */
void prepare_training_pass(const TrainedLayer *layers, int64_t count, int64_t threads) {
    int64_t spectral = 0;
    for (int64_t l = 0; l < count; l++) spectral += layers[l].weight_kind == WEIGHT_SPECTRAL;
    if (!spectral) return;
#pragma omp parallel num_threads(threads)
    for (int64_t l = 0; l < count; l++) {
        if (layers[l].weight_kind != WEIGHT_SPECTRAL) continue;
        find_singular_vectors(&layers[l], 1);
#pragma omp for schedule(static) nowait
        for (int64_t unit = 0; unit < layers[l].units; unit++) pack_unit(&layers[l], unit);
    }
}

/* v becomes v / |v|; a v of length 0 has no direction and stays. */
static void project_unit(const TrainedLayer *layer, int64_t unit) {
    float *v = layer->v + unit * layer->inputs;
    const float norm = sqrtf(dot(v, v, layer->inputs)), scale = norm == 0.0f ? 1.0f : 1.0f / norm;
#pragma omp simd
    for (int64_t i = 0; i < layer->inputs; i++) v[i] *= scale;
}

/* Make the step of one unit's v, g, b and gain. `row` (inputs) is the gradient by the packed weight, in the order of v; it
 * becomes the gradient by v. With s = input_scale:
 * weight norm: see weight_norm.h (with exp(g) in place of g, whose own gradient is exp(g) dg);
 * w = g v: dg = s row.v;  dv = s g row;  spectral normalization: see spectral_norm.c;  otherwise dv = s row */
void step_unit(const TrainedLayer *layer, int64_t unit, float *row, const OptimizerStep *step) {
    const int64_t inputs = layer->inputs, kind = layer->weight_kind;
    const float scale = layer->input_scale;
    float *v = layer->v + unit * inputs;
    float row_factor = scale, v_factor = 0.0f; /* dv = row_factor * row + v_factor * v */
    if (kind == WEIGHT_NORM || kind == WEIGHT_NORM_EXP || kind == WEIGHT_UNIT_SCALED) {
        const float g = unit_scale(layer, unit);
        float g_gradient;
        if (kind == WEIGHT_UNIT_SCALED) {
            g_gradient = scale * dot(row, v, inputs);
            row_factor = scale * g;
        } else {
            g_gradient = weight_norm_gradient(dot(row, v, inputs), g, layer->norm[unit], scale, &row_factor, &v_factor);
        }
        if (kind == WEIGHT_NORM_EXP) g_gradient *= g;
        layer->g_gradient[unit] = g_gradient;
        layer->g[unit] =
            step_one(layer->g[unit], g_gradient, layer->g_moment1 + unit, layer->g_moment2 + unit, step);
    }
    if (kind == WEIGHT_SPECTRAL) {
        row_factor = scale * (layer->c[unit] / *layer->sigma);
        v_factor = -spectral_coefficient(layer) * layer->left[unit]; /* of `right` in place of v */
#pragma omp simd
        for (int64_t i = 0; i < inputs; i++) row[i] = row_factor * row[i] + v_factor * layer->right[i];
    }
    layer->row_factor[unit] = row_factor;
    layer->v_factor[unit] = v_factor;
    if (kind == WEIGHT_SPECTRAL) {
        step_values(v, row, layer->v_moment1 + unit * inputs, layer->v_moment2 + unit * inputs, inputs, 1.0f, 0.0f,
                    step);
    } else if (kind == WEIGHT_GIVEN) {
#pragma omp simd
        for (int64_t i = 0; i < inputs; i++) row[i] *= scale;
    } else {
        step_values(v, row, layer->v_moment1 + unit * inputs, layer->v_moment2 + unit * inputs, inputs, row_factor,
                    v_factor, step);
    }
    if (kind == WEIGHT_UNIT || kind == WEIGHT_UNIT_SCALED) project_unit(layer, unit);
    void *v_gradient = layer->v_gradient ? layer->v_gradient : layer->packed_gradient;
    if (v_gradient && (layer->v_gradient || kind != WEIGHT_PLAIN)) { /* otherwise it stands there already */
        if (layer->v_gradient_bfloat16) {
            uint16_t *out = (uint16_t *)v_gradient + unit * inputs;
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) out[i] = to_bfloat16(row[i]);
        } else {
            memcpy((float *)v_gradient + unit * inputs, row, inputs * sizeof(float));
        }
    }
    float b_gradient = layer->bias_gradient_bfloat16 ? from_bfloat16(((const uint16_t *)layer->bias_gradient)[unit])
                                                : ((const float *)layer->bias_gradient)[unit];
    layer->b[unit] = step_one(layer->b[unit], b_gradient, layer->b_moment1 + unit, layer->b_moment2 + unit, step);
    if (layer->gain)
        layer->gain[unit] = step_one(layer->gain[unit], layer->gain_gradient[unit], layer->gain_moment1 + unit,
                                     layer->gain_moment2 + unit, step);
}

/* step_unit, then the unit's next packed weights, unless more must happen before they are known. */
void step_and_pack_unit(const TrainedLayer *layer, int64_t unit, float *row, const OptimizerStep *step) {
    step_unit(layer, unit, row, step);
    if (layer->weight_kind < WEIGHT_SPECTRAL) pack_unit(layer, unit);
}

/* The gradient that lies in the layer, in the order of v:
 * for i: row[i] = packed_gradient[gradient_offset[i] + unit * gradient_unit_stride] */
static void gather_gradient(const TrainedLayer *layer, int64_t unit, float *row) {
    const int64_t inputs = layer->inputs;
    const int32_t *offset = layer->gradient_offset;
    if (layer->gradient_bfloat16) {
        const uint16_t *gradient = (const uint16_t *)layer->packed_gradient + unit * layer->gradient_unit_stride;
        if (offset) {
            for (int64_t i = 0; i < inputs; i++) row[i] = from_bfloat16(gradient[offset[i]]);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) row[i] = from_bfloat16(gradient[i]);
        }
    } else {
        const float *gradient = (const float *)layer->packed_gradient + unit * layer->gradient_unit_stride;
        for (int64_t i = 0; i < inputs; i++) row[i] = gradient[offset ? offset[i] : i];
    }
}

/* step_and_pack_unit with the gradient that lies in the layer; `row` (inputs) is overwritten. */
void gather_step_and_pack_unit(const TrainedLayer *layer, int64_t unit, float *row, const OptimizerStep *step) {
    gather_gradient(layer, unit, row);
    step_and_pack_unit(layer, unit, row, step);
}

/* Fill `alignment` from the gradients that lie in the layer; called by all threads of a team. `row` is overwritten. */
void find_alignment(const TrainedLayer *layer, float *row) {
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < layer->units; unit++) {
        gather_gradient(layer, unit, row);
        layer->alignment[unit] = packed_scale(layer, unit) * dot(row, layer->v + unit * layer->inputs, layer->inputs);
    }
}

/* One step of every layer and the next packed weights; `rows` has max_inputs floats for each thread. */
void step_layers(const TrainedLayer *layers, int64_t count, int64_t threads, float *rows, int64_t max_inputs,
                 const OptimizerStep *step) {
#pragma omp parallel num_threads(threads)
    {
        float *row = rows + THREAD * max_inputs;
        for (int64_t l = 0; l < count; l++) {
            if (layers[l].weight_kind == WEIGHT_SPECTRAL) find_alignment(&layers[l], row);
#pragma omp for schedule(static) nowait
            for (int64_t unit = 0; unit < layers[l].units; unit++)
                gather_step_and_pack_unit(&layers[l], unit, row, step);
        }
    }
}
