/* From a packed weight's gradient to the next packed weight: weight norm's gradient, Adamax, packing.
 *
 * Each unit (a row of the weight) is computed by one thread in one order, so no result depends on the number of
 * threads.
 */
#include "optimizer.h"
#include <math.h>
#include "scalar.h"

/* Adamax (Kingma & Ba 2015, section 7.1), epsilon where torch has it:
 * m = beta1 m + (1 - beta1) d;  u = max(beta2 u, |d| + eps);  value -= step_size m / u */
static inline float adamax_step(float value, float gradient, float *exp_avg, float *exp_inf, Adamax adamax) {
    float m = *exp_avg + (1.0f - adamax.beta1) * (gradient - *exp_avg);
    float decayed = adamax.beta2 * *exp_inf, size = fabsf(gradient) + adamax.eps;
    float u = decayed > size ? decayed : size; /* a NaN gradient gives NaN */
    *exp_avg = m;
    *exp_inf = u;
    return value - adamax.step_size * (m / u);
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
static __attribute__((noinline)) float dot(const float *a, const float *b, int64_t count) {
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

/* The factor that makes a unit's packed weight of v: input_scale, with weight norm input_scale * g / |v|. Writes
 * norm = |v|. */
__attribute__((noinline)) float packed_scale(const TrainedLayer *layer, int64_t unit) {
    const int64_t inputs = layer->inputs;
    const float *v = layer->v + unit * inputs;
    if (!layer->weight_normalized) return layer->input_scale;
    layer->norm[unit] = sqrtf(dot(v, v, inputs));
    return layer->input_scale * (layer->g[unit] / layer->norm[unit]);
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
#pragma omp for schedule(static) nowait
        for (int64_t unit = 0; unit < layers[l].units; unit++) pack_unit(&layers[l], unit);
    }
}

/* Make the Adamax step of one unit's v, g, b and gain. `row` (inputs) is the gradient by the packed weight, in the order
 * of v; it becomes the gradient by v. With s = input_scale and weight norm, equation 3 of Salimans & Kingma 2016:
 * dg = s row.v / |v|;  dv = s g / |v| row - g dg / |v|^2 v;  otherwise dv = s row */
void step_unit(const TrainedLayer *layer, int64_t unit, float *row, const Adamax *given) {
    const int64_t inputs = layer->inputs;
    const float scale = layer->input_scale;
    const Adamax adamax = *given;
    float *v = layer->v + unit * inputs;
    float row_factor = scale, v_factor = 0.0f; /* dv = row_factor * row + v_factor * v */
    if (layer->weight_normalized) {
        float norm = layer->norm[unit], g = layer->g[unit];
        float g_gradient = scale * dot(row, v, inputs) / norm;
        layer->g_gradient[unit] = g_gradient;
        row_factor = scale * g / norm;
        v_factor = -(g * g_gradient / (norm * norm));
        layer->g[unit] = adamax_step(g, g_gradient, layer->g_exp_avg + unit, layer->g_exp_inf + unit, adamax);
    }
    float *exp_avg = layer->v_exp_avg + unit * inputs, *exp_inf = layer->v_exp_inf + unit * inputs;
#pragma omp simd
    for (int64_t i = 0; i < inputs; i++) {
        float gradient = row_factor * row[i] + v_factor * v[i];
        row[i] = gradient;
        v[i] = adamax_step(v[i], gradient, exp_avg + i, exp_inf + i, adamax);
    }
    void *v_gradient = layer->v_gradient ? layer->v_gradient : layer->packed_gradient;
    if (v_gradient && (layer->v_gradient || layer->weight_normalized)) { /* otherwise it stands there already */
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
    layer->b[unit] = adamax_step(layer->b[unit], b_gradient, layer->b_exp_avg + unit, layer->b_exp_inf + unit, adamax);
    if (layer->gain)
        layer->gain[unit] = adamax_step(layer->gain[unit], layer->gain_gradient[unit], layer->gain_exp_avg + unit,
                                        layer->gain_exp_inf + unit, adamax);
}

/* step_unit, then the unit's next packed weights. */
void step_and_pack_unit(const TrainedLayer *layer, int64_t unit, float *row, const Adamax *adamax) {
    step_unit(layer, unit, row, adamax);
    pack_unit(layer, unit);
}

/* step_and_pack_unit with the gradient that lies in the layer; `row` (inputs) is overwritten:
 * for i: row[i] = packed_gradient[gradient_offset[i] + unit * gradient_unit_stride] */
void gather_step_and_pack_unit(const TrainedLayer *layer, int64_t unit, float *row, const Adamax *adamax) {
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
    step_and_pack_unit(layer, unit, row, adamax);
}

/* One Adamax step of every layer and the next packed weights; `rows` has max_inputs floats for each thread. */
void step_layers(const TrainedLayer *layers, int64_t count, int64_t threads, float *rows, int64_t max_inputs,
                 float step_size, float beta1, float beta2, float eps) {
    const Adamax adamax = {step_size, beta1, beta2, eps};
#pragma omp parallel num_threads(threads)
    {
        float *row = rows + THREAD * max_inputs;
        for (int64_t l = 0; l < count; l++) {
#pragma omp for schedule(static) nowait
            for (int64_t unit = 0; unit < layers[l].units; unit++)
                gather_step_and_pack_unit(&layers[l], unit, row, &adamax);
        }
    }
}
