/* The passes over memory that an update on a CPU would otherwise make one by one; agents/native.py compiles and calls them.
 *
 * Rows (output units) are shared among threads and each is computed by one thread in one order, so no result depends on
 * the number of threads.
 */
#include "structs.h"

/* Adamax (Kingma & Ba 2015, section 7.1), epsilon where torch has it. */
static inline float moved(float value, float gradient, float *mean, float *max, Adamax adamax) {
    float m = *mean + (1.0f - adamax.beta1) * (gradient - *mean);
    float decayed = adamax.beta2 * *max, size = fabsf(gradient) + adamax.eps;
    float u = decayed > size ? decayed : size; /* not a number stays what it is */
    *mean = m;
    *max = u;
    return value - adamax.rate * (m / u);
}

/* Write v * scale, one unit's, where the passes want it. */
static inline void arrange(void *work, const int32_t *place, int64_t start, int64_t low, const float *v,
                           int64_t inputs, float scale) {
    if (low) {
        uint16_t *out = (uint16_t *)work + start;
        if (place) {
            for (int64_t i = 0; i < inputs; i++) out[place[i]] = rounded(v[i] * scale);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) out[i] = rounded(v[i] * scale);
        }
    } else {
        float *out = (float *)work + start;
        if (place) {
            for (int64_t i = 0; i < inputs; i++) out[place[i]] = v[i] * scale;
        } else {
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) out[i] = v[i] * scale;
        }
    }
}

#define LANES 64

/* The sum of a[i] * b[i], in lanes that do not wait for each other. Not inlined: the same instructions, so the same
 * rounding, after a step and after a resume. */
static __attribute__((noinline)) float product(const float *a, const float *b, int64_t count) {
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

__attribute__((noinline)) float scale_of(const Layer *layer, int64_t unit) {
    const int64_t inputs = layer->inputs;
    const float *v = layer->v + unit * inputs;
    if (!layer->normalized) return layer->factor;
    layer->norm[unit] = sqrtf(product(v, v, inputs));
    return layer->factor * (layer->g[unit] / layer->norm[unit]);
}

/* Make a unit's working weight of what is trained. */
static void renew(const Layer *layer, int64_t unit) {
    const int64_t inputs = layer->inputs;
    const float *v = layer->v + unit * inputs, scale = scale_of(layer, unit);
    arrange(layer->work, layer->place, unit * layer->unit_step, layer->low, v, inputs, scale);
    if (layer->back) {
        const int64_t start = unit / layer->back_pair * layer->back_unit_step + unit % layer->back_pair;
        arrange(layer->back, layer->back_place, start, layer->low, v, inputs, scale);
    }
    if (layer->bias && layer->low)
        ((uint16_t *)layer->bias)[unit] = rounded(layer->b[unit]);
    else if (layer->bias)
        ((float *)layer->bias)[unit] = layer->b[unit];
}

/* Make all working weights anew, after something else has changed what is trained. */
void renew_layers(const Layer *layers, int64_t count, int64_t threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t l = 0; l < count; l++) {
#pragma omp for schedule(static) nowait
        for (int64_t unit = 0; unit < layers[l].units; unit++) renew(&layers[l], unit);
    }
}

void step_trained(const Layer *layer, int64_t unit, float *row, const Adamax *given) {
    const int64_t inputs = layer->inputs;
    const float factor = layer->factor;
    const Adamax adamax = *given;
    float *v = layer->v + unit * inputs;
    float across = factor, along = 0.0f; /* the gradient of v is across * row + along * v */
    if (layer->normalized) {             /* equation 3 of Salimans & Kingma 2016 */
        float norm = layer->norm[unit], g = layer->g[unit];
        float g_gradient = factor * product(row, v, inputs) / norm;
        layer->g_gradient[unit] = g_gradient;
        across = factor * g / norm;
        along = -(g * g_gradient / (norm * norm));
        layer->g[unit] = moved(g, g_gradient, layer->g_mean + unit, layer->g_max + unit, adamax);
    }
    float *mean = layer->v_mean + unit * inputs, *max = layer->v_max + unit * inputs;
#pragma omp simd
    for (int64_t i = 0; i < inputs; i++) {
        float gradient = across * row[i] + along * v[i];
        row[i] = gradient;
        v[i] = moved(v[i], gradient, mean + i, max + i, adamax);
    }
    void *kept = layer->v_gradient ? layer->v_gradient : layer->gradient;
    if (kept && (layer->v_gradient || layer->normalized)) { /* else it stands there already */
        if (layer->low_kept) {
            uint16_t *whole = (uint16_t *)kept + unit * inputs;
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) whole[i] = rounded(row[i]);
        } else {
            memcpy((float *)kept + unit * inputs, row, inputs * sizeof(float));
        }
    }
    float b_gradient = layer->low_gradient ? widened(((const uint16_t *)layer->bias_gradient)[unit])
                                           : ((const float *)layer->bias_gradient)[unit];
    layer->b[unit] = moved(layer->b[unit], b_gradient, layer->b_mean + unit, layer->b_max + unit, adamax);
}

void step_unit(const Layer *layer, int64_t unit, float *row, const Adamax *adamax) {
    step_trained(layer, unit, row, adamax);
    renew(layer, unit);
}

void step_gathered(const Layer *layer, int64_t unit, float *row, const Adamax *adamax) {
    const int64_t inputs = layer->inputs;
    const int32_t *place = layer->gradient_place;
    if (layer->low_gradient) {
        const uint16_t *given = (const uint16_t *)layer->gradient + unit * layer->gradient_unit_step;
        if (place) {
            for (int64_t i = 0; i < inputs; i++) row[i] = widened(given[place[i]]);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) row[i] = widened(given[i]);
        }
    } else {
        const float *given = (const float *)layer->gradient + unit * layer->gradient_unit_step;
        for (int64_t i = 0; i < inputs; i++) row[i] = given[place ? place[i] : i];
    }
    step_unit(layer, unit, row, adamax);
}

/* One Adamax step of every layer, and the working weights that follow; `rows` has `longest` floats for each thread. */
void step_layers(const Layer *layers, int64_t count, int64_t threads, float *rows, int64_t longest, float rate,
                 float beta1, float beta2, float eps) {
    const Adamax adamax = {rate, beta1, beta2, eps};
#pragma omp parallel num_threads(threads)
    {
        float *row = rows + THREAD * longest;
        for (int64_t l = 0; l < count; l++) {
#pragma omp for schedule(static) nowait
            for (int64_t unit = 0; unit < layers[l].units; unit++) step_gathered(&layers[l], unit, row, &adamax);
        }
    }
}

/* Gather pieces of `size` bytes into `packed`; the compiler makes one instruction of a copy of known size. */
static inline void gather(uint8_t *packed, const uint8_t *line, int64_t across, int64_t channels, int64_t size) {
    for (int64_t x = 0; x < across; x++) memcpy(packed + x * channels, line + x * size, size);
}

void pack_strip(const uint8_t *const *frames, int64_t start, int64_t stack, int64_t width, int64_t size, int64_t low,
                void *packed) {
    const int64_t across = width / size, channels = stack * size * size;
    uint8_t pixels[across * channels];
    for (int64_t f = 0; f < stack; f++) {
        for (int64_t y = 0; y < size; y++) {
            uint8_t *first = pixels + (f * size + y) * size;
            const uint8_t *line = frames[f] + start + y * width;
            if (size == 4)
                gather(first, line, across, channels, 4);
            else
                gather(first, line, across, channels, size);
        }
    }
    if (low) {
        uint16_t *out = packed;
        for (int64_t i = 0; i < across * channels; i++) {
            float value = (float)pixels[i];
            uint32_t bits;
            memcpy(&bits, &value, 4);
            out[i] = (uint16_t)(bits >> 16); /* exact: eight bits hold 0 to 255 */
        }
    } else {
        float *out = packed;
        for (int64_t i = 0; i < across * channels; i++) out[i] = (float)pixels[i];
    }
}

/* Write uint8 frames as blocks of `size` x `size` pixels: (batch, height / size, width / size, frames * size * size). */
void pack(const uint8_t *frames, int64_t batch_stride, int64_t frame_stride, int64_t batch, int64_t stack,
          int64_t height, int64_t width, int64_t size, int64_t low, int64_t threads, void *packed) {
    const int64_t down = height / size, strip_size = width * stack * size;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t strip = 0; strip < batch * down; strip++) {
        const uint8_t *of[stack];
        for (int64_t f = 0; f < stack; f++) of[f] = frames + strip / down * batch_stride + f * frame_stride;
        pack_strip(of, strip % down * size * width, stack, width, size, low,
                   (uint8_t *)packed + strip * strip_size * (low ? 2 : 4));
    }
}
