/* The passes over memory that an update on a CPU would otherwise make one by one; agents/native.py compiles and calls them.
 *
 * Rows (output units) are shared among threads and each is computed by one thread in one order, so no result depends on
 * the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#else
#define THREAD 0
#endif

typedef struct {
    int64_t units, inputs;          /* of the weight, seen as a matrix */
    int64_t normalized;             /* 1: w = g v / |v|; 0: w is trained, and v stands for it */
    int64_t low;                    /* 1: working weight, bias and their gradients are bfloat16, 0: float32 */
    float factor;                   /* the working weight is w * factor */
    const int32_t *place;           /* where an input's weight lies in a row of the working weight; NULL: where it is */
    float *v, *v_mean, *v_max;      /* trained: values and moments */
    float *g, *g_mean, *g_max;
    float *b, *b_mean, *b_max;
    float *g_gradient;              /* written */
    float *v_gradient;              /* written; NULL: it takes the place of the working weight's */
    float *norm;                    /* |v| of each unit */
    void *work, *bias;              /* what the passes compute with */
    void *gradient, *bias_gradient; /* of these */
} Layer;

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

/* Adamax (Kingma & Ba 2015, section 7.1), epsilon where torch has it. */
static inline float adamax(float value, float gradient, float *mean, float *max, float rate, float beta1, float beta2,
                           float eps) {
    float m = *mean + (1.0f - beta1) * (gradient - *mean);
    float decayed = beta2 * *max, size = fabsf(gradient) + eps;
    float u = decayed > size ? decayed : size; /* not a number stays what it is */
    *mean = m;
    *max = u;
    return value - rate * (m / u);
}

/* Make a unit's working weight of what is trained. Not inlined: the same instructions after a step and after a resume. */
__attribute__((noinline)) static void renew(const Layer *layer, int64_t unit) {
    const int64_t inputs = layer->inputs;
    const float *v = layer->v + unit * inputs;
    const int32_t *place = layer->place;
    float scale = layer->factor;
    if (layer->normalized) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < inputs; i++) sum += v[i] * v[i];
        layer->norm[unit] = sqrtf(sum);
        scale *= layer->g[unit] / layer->norm[unit];
    }
    if (layer->low) {
        uint16_t *work = (uint16_t *)layer->work + unit * inputs;
        if (place) {
            for (int64_t i = 0; i < inputs; i++) work[place[i]] = rounded(v[i] * scale);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) work[i] = rounded(v[i] * scale);
        }
        ((uint16_t *)layer->bias)[unit] = rounded(layer->b[unit]);
    } else {
        float *work = (float *)layer->work + unit * inputs;
        if (place) {
            for (int64_t i = 0; i < inputs; i++) work[place[i]] = v[i] * scale;
        } else {
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) work[i] = v[i] * scale;
        }
        ((float *)layer->bias)[unit] = layer->b[unit];
    }
}

/* Make all working weights anew, after something else has changed what is trained. */
void renew_layers(const Layer *layers, int64_t count, int64_t threads) {
#pragma omp parallel num_threads(threads)
    for (int64_t l = 0; l < count; l++) {
#pragma omp for schedule(static) nowait
        for (int64_t unit = 0; unit < layers[l].units; unit++) renew(&layers[l], unit);
    }
}

/* Step one unit. `row` is this thread's own: the gradient of w in the order of what is trained. */
static void step(const Layer *layer, int64_t unit, float *row, float rate, float beta1, float beta2, float eps) {
    const int64_t inputs = layer->inputs;
    const int32_t *place = layer->place;
    const float factor = layer->factor;
    float *v = layer->v + unit * inputs;
    if (layer->low) {
        const uint16_t *given = (const uint16_t *)layer->gradient + unit * inputs;
        if (place) {
            for (int64_t i = 0; i < inputs; i++) row[i] = widened(given[place[i]]) * factor;
        } else {
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) row[i] = widened(given[i]) * factor;
        }
    } else {
        const float *given = (const float *)layer->gradient + unit * inputs;
        if (place) {
            for (int64_t i = 0; i < inputs; i++) row[i] = given[place[i]] * factor;
        } else {
#pragma omp simd
            for (int64_t i = 0; i < inputs; i++) row[i] = given[i] * factor;
        }
    }
    float across = 1.0f, along = 0.0f; /* the gradient of v is across * row + along * v */
    if (layer->normalized) {           /* equation 3 of Salimans & Kingma 2016 */
        float norm = layer->norm[unit], g = layer->g[unit], dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < inputs; i++) dot += row[i] * v[i];
        float g_gradient = dot / norm;
        layer->g_gradient[unit] = g_gradient;
        across = g / norm;
        along = -(g * g_gradient / (norm * norm));
        layer->g[unit] = adamax(g, g_gradient, layer->g_mean + unit, layer->g_max + unit, rate, beta1, beta2, eps);
    }
    float *mean = layer->v_mean + unit * inputs, *max = layer->v_max + unit * inputs;
#pragma omp simd
    for (int64_t i = 0; i < inputs; i++) {
        float gradient = across * row[i] + along * v[i];
        row[i] = gradient;
        v[i] = adamax(v[i], gradient, mean + i, max + i, rate, beta1, beta2, eps);
    }
    if (layer->v_gradient) {
        memcpy(layer->v_gradient + unit * inputs, row, inputs * sizeof(float));
    } else if (layer->normalized && layer->low) {
        uint16_t *whole = (uint16_t *)layer->gradient + unit * inputs;
#pragma omp simd
        for (int64_t i = 0; i < inputs; i++) whole[i] = rounded(row[i]);
    } else if (layer->normalized) {
        memcpy((float *)layer->gradient + unit * inputs, row, inputs * sizeof(float));
    }
    float b_gradient = layer->low ? widened(((const uint16_t *)layer->bias_gradient)[unit])
                                  : ((const float *)layer->bias_gradient)[unit];
    layer->b[unit] =
        adamax(layer->b[unit], b_gradient, layer->b_mean + unit, layer->b_max + unit, rate, beta1, beta2, eps);
    renew(layer, unit);
}

/* One Adamax step of every layer, and the working weights that follow; `rows` has `longest` floats for each thread. */
void step_layers(const Layer *layers, int64_t count, int64_t threads, float *rows, int64_t longest, float rate,
                 float beta1, float beta2, float eps) {
#pragma omp parallel num_threads(threads)
    {
        float *row = rows + THREAD * longest;
        for (int64_t l = 0; l < count; l++) {
#pragma omp for schedule(static) nowait
            for (int64_t unit = 0; unit < layers[l].units; unit++)
                step(&layers[l], unit, row, rate, beta1, beta2, eps);
        }
    }
}

/* Gather pieces of `size` bytes into `packed`; the compiler makes one instruction of a copy of known size. */
static inline void gather(uint8_t *packed, const uint8_t *line, int64_t across, int64_t channels, int64_t size) {
    for (int64_t x = 0; x < across; x++) memcpy(packed + x * channels, line + x * size, size);
}

/* Write uint8 frames as blocks of `size` x `size` pixels: (batch, height / size, width / size, frames * size * size). */
void pack(const uint8_t *frames, int64_t batch_stride, int64_t frame_stride, int64_t batch, int64_t stack,
          int64_t height, int64_t width, int64_t size, int64_t low, int64_t threads, void *packed) {
    const int64_t down = height / size, across = width / size, channels = stack * size * size;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t strip = 0; strip < batch * down; strip++) {
        uint8_t pixels[across * channels];
        for (int64_t f = 0; f < stack; f++) {
            const uint8_t *top = frames + strip / down * batch_stride + f * frame_stride + strip % down * size * width;
            for (int64_t y = 0; y < size; y++) {
                uint8_t *start = pixels + (f * size + y) * size;
                if (size == 4)
                    gather(start, top + y * width, across, channels, 4);
                else
                    gather(start, top + y * width, across, channels, size);
            }
        }
        if (low) {
            uint16_t *out = (uint16_t *)packed + strip * across * channels;
            for (int64_t i = 0; i < across * channels; i++) {
                float value = (float)pixels[i];
                uint32_t bits;
                memcpy(&bits, &value, 4);
                out[i] = (uint16_t)(bits >> 16); /* exact: eight bits hold 0 to 255 */
            }
        } else {
            float *out = (float *)packed + strip * across * channels;
            for (int64_t i = 0; i < across * channels; i++) out[i] = (float)pixels[i];
        }
    }
}
