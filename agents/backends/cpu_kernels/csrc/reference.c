/* Plain loops that the kernels equal, one for each, in float32 and channels-last order; the tests build them.
 *
 * Where a kernel adds in a fixed order, its loop adds in that order, with one rounding where the processor can that both
 * are compiled for, so float32 agrees bit for bit. Arrays are elements in their natural order:
 * observations (batch, y, x, channel), weights (kernel, kernel, in_channels, out_channels); pairs of bfloat16 and other
 * layouts are the tests' business.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>
#include "structs.h"

#define FOR(i, count) for (int64_t i = 0; i < (count); i++)

static float multiply_add(float a, float b, float sum) {
#if defined(__FMA__) || defined(__aarch64__)
    return fmaf(a, b, sum);
#else
    return sum + a * b;
#endif
}

static float relu(float x) { return x < 0.0f ? 0.0f : x; }

/* frames (batch, count, height, width) as blocks (batch, height / block, width / block, count, block, block). */
void reference_pack_frames(const uint8_t *frames, int64_t batch, int64_t count, int64_t height, int64_t width,
                           int64_t block, float *packed) {
    FOR(n, batch) FOR(y, height / block) FOR(x, width / block) FOR(f, count) FOR(i, block) FOR(j, block)
        *packed++ = frames[((n * count + f) * height + y * block + i) * width + x * block + j];
}

/* Which blocks (batch, in_height, in_width, in_channels) have a nonzero element: bit x of
 * nonzero (batch, in_height). */
void reference_nonzero_blocks(const ConvShape *conv, int64_t batch, const float *blocks, uint64_t *nonzero) {
    FOR(row, batch * conv->in_height) {
        nonzero[row] = 0;
        FOR(x, conv->in_width) FOR(c, conv->in_channels)
            if (blocks[(row * conv->in_width + x) * conv->in_channels + c] != 0.0f) nonzero[row] |= (uint64_t)1 << x;
    }
}

/* A convolution with bias and ReLU: in (batch, in_height, in_width, in_channels) to
 * out (batch, out_height, out_width, out_channels). */
void reference_conv_forward(const ConvShape *conv, int64_t batch, const float *in, const float *weight,
                            const float *bias, float *out) {
    const int64_t s = conv->stride, k = conv->kernel, channels = conv->in_channels, units = conv->out_channels;
    FOR(n, batch) FOR(y, conv->out_height) FOR(x, conv->out_width) FOR(u, units) {
        float sum = 0.0f;
        FOR(i, k) FOR(j, k) FOR(c, channels) {
            const int64_t at = ((n * conv->in_height + y * s + i) * conv->in_width + x * s + j) * channels + c;
            sum = multiply_add(in[at], weight[((i * k + j) * channels + c) * units + u], sum);
        }
        *out++ = relu(sum + bias[u]);
    }
}

/* A dense layer: x (batch, inputs), weight (units, inputs) to out (batch, units). */
void reference_dense_forward(int64_t batch, int64_t inputs, int64_t units, const float *x, const float *weight,
                             const float *bias, int64_t with_relu, float *out) {
    FOR(n, batch) FOR(u, units) {
        double sum = 0.0;
        FOR(k, inputs) sum += (double)x[n * inputs + k] * weight[u * inputs + k];
        const float value = (float)sum + bias[u];
        *out++ = with_relu ? relu(value) : value;
    }
}

/* The gradient by a dense layer's input, dy (batch, units) to dx (batch, inputs); zero where x is not positive: x is
 * the output of a ReLU. Without x everything passes. */
void reference_dense_input_backward(int64_t batch, int64_t inputs, int64_t units, const float *dy, const float *weight,
                                    const float *x, float *dx) {
    FOR(n, batch) FOR(k, inputs) {
        float sum = 0.0f;
        FOR(u, units) sum = multiply_add(dy[n * units + u], weight[u * inputs + k], sum);
        *dx++ = !x || x[n * inputs + k] > 0.0f ? sum : 0.0f;
    }
}

/* The gradients by a dense layer's weight (units, inputs) and bias (units). */
void reference_dense_weight_backward(int64_t batch, int64_t inputs, int64_t units, const float *dy, const float *x,
                                     float *dw, float *db) {
    FOR(u, units) {
        db[u] = 0.0f;
        FOR(n, batch) db[u] += dy[n * units + u];
        FOR(k, inputs) {
            float sum = 0.0f;
            FOR(n, batch) sum = multiply_add(dy[n * units + u], x[n * inputs + k], sum);
            dw[u * inputs + k] = sum;
        }
    }
}

/* The gradient by a convolution's input, dy (batch, out_height, out_width, out_channels) to dx as `in`; zero where
 * `in`, the output of a ReLU, is. Taps are added from the last to the first, as in a convolution with the reversed
 * kernel. */
void reference_conv_input_backward(const ConvShape *conv, int64_t batch, const float *dy, const float *weight,
                                   const float *in, float *dx) {
    const int64_t s = conv->stride, k = conv->kernel, channels = conv->in_channels, units = conv->out_channels;
    FOR(n, batch) FOR(h, conv->in_height) FOR(w, conv->in_width) FOR(c, channels) {
        float sum = 0.0f;
        for (int64_t i = k - s + h % s; i >= 0; i -= s) {
            const int64_t y = (h - i) / s;
            if (h < i || y >= conv->out_height) continue;
            for (int64_t j = k - s + w % s; j >= 0; j -= s) {
                const int64_t x = (w - j) / s;
                if (w < j || x >= conv->out_width) continue;
                FOR(u, units)
                    sum = multiply_add(dy[((n * conv->out_height + y) * conv->out_width + x) * units + u],
                               weight[((i * k + j) * channels + c) * units + u], sum);
            }
        }
        *dx++ = *in++ != 0.0f ? sum : 0.0f;
    }
}

/* The gradients by a convolution's weight and bias. */
void reference_conv_weight_backward(const ConvShape *conv, int64_t batch, const float *dy, const float *in, float *dw,
                                    float *db) {
    const int64_t s = conv->stride, k = conv->kernel, channels = conv->in_channels, units = conv->out_channels;
    FOR(i, k) FOR(j, k) FOR(c, channels) FOR(u, units) {
        float sum = 0.0f;
        FOR(n, batch) FOR(y, conv->out_height) FOR(x, conv->out_width)
            sum = multiply_add(in[((n * conv->in_height + y * s + i) * conv->in_width + x * s + j) * channels + c],
                       dy[((n * conv->out_height + y) * conv->out_width + x) * units + u], sum);
        *dw++ = sum;
    }
    FOR(u, units) {
        db[u] = 0.0f;
        FOR(p, batch * conv->out_height * conv->out_width) db[u] += dy[p * units + u];
    }
}

/* One unit's step in float64: weight norm's gradient (equation 3 of Salimans & Kingma 2016) and Adamax of v (inputs)
 * and, unless it is NULL, g; dw (inputs) is the gradient by w = g v / |v| or v, and becomes that by v. `m` and `u`
 * hold the moments of v, then of g. */
void reference_step(int64_t inputs, double *dw, double *v, double *g, double *m, double *u, double step_size,
                    double beta1, double beta2, double eps) {
    double dg = 0.0, square = 0.0;
    FOR(i, inputs) square += v[i] * v[i];
    const double norm = sqrt(square);
    if (g) {
        FOR(i, inputs) dg += dw[i] * v[i] / norm;
        FOR(i, inputs) dw[i] = *g / norm * dw[i] - *g * dg / square * v[i];
    }
    FOR(i, inputs + (g != NULL)) {
        double *value = i < inputs ? v + i : g, gradient = i < inputs ? dw[i] : dg;
        m[i] = beta1 * m[i] + (1.0 - beta1) * gradient;
        u[i] = fmax(beta2 * u[i], fabs(gradient) + eps);
        *value -= step_size * m[i] / u[i];
    }
}

/* The TD error of a transition, its Huber loss and the loss's derivative by Q(s, a), in float64. */
void reference_td_loss(int64_t actions, const float *q_values, const float *next_q_values, int64_t action,
                       double reward, int64_t terminal, double gamma, double reward_clip, double *td_error,
                       double *loss, double *gradient) {
    double best = next_q_values[0];
    FOR(a, actions) best = fmax(best, next_q_values[a]);
    if (reward_clip > 0.0) reward = fmin(fmax(reward, -reward_clip), reward_clip);
    const double error = reward + (terminal ? 0.0 : gamma * best) - q_values[action];
    *td_error = error;
    *loss = fabs(error) < 1.0 ? 0.5 * error * error : fabs(error) - 0.5;
    *gradient = -fmin(fmax(error, -1.0), 1.0);
}

/* The frame of each of the frames + 1 of a transition's two observations, oldest first; `capacity` stands for black. */
void reference_frame_indices(const ReplayStorage *replay, int64_t index, int64_t *frame_indices) {
    const int64_t entry = replay->entry_of[index % replay->capacity];
    FOR(f, replay->frames + 1) {
        int64_t frame = entry;
        for (int64_t back = f; back < replay->frames - 1; back++) frame -= replay->num_envs;
        if (f == replay->frames) frame += replay->num_envs;
        frame = ((frame % replay->capacity) + replay->capacity) % replay->capacity;
        frame_indices[f] = replay->frames - 1 - f > replay->age[entry] ? replay->capacity : frame;
    }
}

/* A normalization forward and backward in float64: t and dy, the gradient by y, (batch, positions, units), to the mean
 * and the variance of each group of numbers, x = (t - mean) / sqrt(variance + eps), or x = t - mean, the gradient by t,
 * and those of bias and gain, of which y = gain * x + bias. `groups` (2, as many) is scratch. */
void reference_normalization(int64_t over, int64_t mean_only, int64_t batch, int64_t positions, int64_t units, double eps,
                             const double *gain, const double *t, const double *dy, double *mean, double *variance,
                             double *x, double *dt, double *dbias, double *dgain, double *groups) {
    const int64_t size = batch * positions * units;
    const int64_t count = over == BATCH ? units : over == EXAMPLE ? batch : batch * positions;
#define GROUP (over == BATCH ? i % units : over == EXAMPLE ? i / (positions * units) : i / units)
    const double members = (double)(size / count);
    memset(mean, 0, count * sizeof(double));
    memset(variance, 0, count * sizeof(double));
    memset(groups, 0, 2 * count * sizeof(double));
    memset(dbias, 0, units * sizeof(double));
    memset(dgain, 0, units * sizeof(double));
    FOR(i, size) mean[GROUP] += t[i] / members;
    FOR(i, size) variance[GROUP] += (t[i] - mean[GROUP]) * (t[i] - mean[GROUP]) / members;
    FOR(i, size) {
        x[i] = (t[i] - mean[GROUP]) / (mean_only ? 1.0 : sqrt(variance[GROUP] + eps));
        dbias[i % units] += dy[i];
        dgain[i % units] += dy[i] * x[i];
        groups[GROUP] += gain[i % units] * dy[i] / members;
        groups[count + GROUP] += gain[i % units] * dy[i] * x[i] / members;
    }
    FOR(i, size) {
        const double centred = gain[i % units] * dy[i] - groups[GROUP];
        dt[i] = mean_only ? centred : (centred - x[i] * groups[count + GROUP]) / sqrt(variance[GROUP] + eps);
    }
#undef GROUP
}
