/* The entry points that ../kernel_network.py calls: forward pass, backward pass with step, whole updates.
 *
 * Each number is computed by one thread in one order, so no result depends on the number of threads.
 */
#include <math.h>
#include <time.h>
#include "kernels.h"
#include "output_normalization.h"
#include "simd.h"
#include "stages.h"
#include "td_loss.h"
#include "tiles.h"

/* Whether the processor has the vectors for the functions below in this precision. */
int64_t supports_precision(int64_t precision) {
#if defined(VECTOR_KERNELS) && defined(__AVX512BF16__)
    return precision == FLOAT32 || precision == BFLOAT16;
#elif defined(VECTOR_KERNELS)
    return precision == FLOAT32;
#else
    (void)precision;
    return 0;
#endif
}

/* The sizes of the structures, to compare with those of ../structs.py, (7). */
void struct_sizes(int64_t *sizes) {
    sizes[0] = sizeof(TrainedLayer);
    sizes[1] = sizeof(NetworkShape);
    sizes[2] = sizeof(ForwardArgs);
    sizes[3] = sizeof(BackwardArgs);
    sizes[4] = sizeof(ReplayStorage);
    sizes[5] = sizeof(TDLossArgs);
    sizes[6] = sizeof(OptimizerStep);
    sizes[7] = sizeof(Normalization);
}

#ifdef VECTOR_KERNELS

/* Pairs of observations on their way through the convolutions. A stage ends where a layer needs the statistics of the
 * minibatch; without such a layer there is one. Stage i begins at layer from[i]. */
typedef struct {
    StagedQueue pairs;
    int64_t from[MAX_CONVOLUTIONS + 1];
} ConvQueue;

static ConvQueue forward_queue(const NetworkShape *shape, const ForwardArgs *args) {
    ConvQueue queue = {.from = {0}};
    int64_t stages = 1;
    for (int64_t l = 0; l < shape->convolutions; l++)
        if (needs_batch(args->normalization[l])) queue.from[stages++] = l + 1;
    queue.pairs = staged_queue(stages, (args->batch + 1) / 2);
    return queue;
}

/* The same from the hidden layer's input down. */
static ConvQueue backward_queue(const NetworkShape *shape, const ForwardArgs *args) {
    ConvQueue queue = {.from = {shape->convolutions}};
    int64_t stages = 1;
    for (int64_t l = shape->convolutions - 1; l >= 0; l--)
        if (needs_batch(args->normalization[l])) queue.from[stages++] = l;
    queue.pairs = staged_queue(stages, (args->batch + 1) / 2);
    return queue;
}

/* A thread's share of the convolutions of `count` networks. Stages of the last network first: while one is finished by
 * another thread, there is something else to do. */
static void work_off_convolutions(const NetworkShape *shape, const ForwardArgs *passes, int64_t count,
                                  ConvQueue *queues, int64_t threads, uint8_t *workspace) {
    for (;;) {
        int64_t i = count - 1, taken = -1, waiting = 0;
        for (; i >= 0 && (taken = take_item(&queues[i].pairs)) < 0; i--) waiting += !all_done(&queues[i].pairs);
        if (taken < 0 && !waiting) return;
        if (taken < 0) {
            spin_pause();
            continue;
        }
        ConvQueue *queue = &queues[i];
        const int64_t stage = taken / queue->pairs.items, n = taken % queue->pairs.items * 2;
        conv_forward(shape, &passes[i], queue->from[stage], n, n + 2 * threads, workspace);
        if (!finish_item(&queue->pairs)) continue;
        if (stage + 1 < queue->pairs.stages) {
            const Normalization *norm = passes[i].normalization[queue->from[stage + 1] - 1];
            batch_statistics(norm, passes[i].batch, 0, norm->units);
        }
        open_next_stage(&queue->pairs);
    }
}

/* The forward passes of `count` networks; `workspace` has workspace_bytes for each thread. */
void network_forward(const NetworkShape *shape, const ForwardArgs *passes, int64_t count, uint8_t *workspace,
                     int64_t threads) {
    ConvQueue queues[count];
    int normalized = 0; /* any convolution, then of all networks */
    for (int64_t i = 0; i < count; i++) {
        queues[i] = forward_queue(shape, &passes[i]);
        for (int64_t l = 0; l < shape->convolutions; l++) normalized |= passes[i].normalization[l] != NULL;
    }
#pragma omp parallel num_threads(threads)
    {
        uint8_t *mine = workspace + THREAD * shape->workspace_bytes;
        if (shape->tiles) configure_tiles();
        if (USES_TILES(shape, TILE_CONV_FORWARD) && !normalized) {
            for (int64_t i = 0; i < count; i++) {
#pragma omp for schedule(dynamic, 1) nowait
                for (int64_t n = 0; n < passes[i].batch; n += 2)
                    tile_conv_forward(shape, &passes[i], n, n + 2 * threads, mine);
            }
        } else {
            work_off_convolutions(shape, passes, count, queues, threads, mine);
        }
#pragma omp barrier
        for (int64_t i = 0; i < count && USES_TILES(shape, TILE_HIDDEN_FORWARD); i++) {
#pragma omp for schedule(static)
            for (int64_t word = 0; word < shape->flat / 2; word += 16) transpose_flat(shape, &passes[i], word);
        }
        const int64_t units = USES_TILES(shape, TILE_HIDDEN_FORWARD) ? 32 : 16; /* of a call */
        for (int64_t i = 0; i < count; i++) {
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t u = 0; u < shape->hidden; u += units) {
                if (USES_TILES(shape, TILE_HIDDEN_FORWARD))
                    tile_hidden_forward(shape, &passes[i], u);
                else
                    hidden_forward(shape, &passes[i], u, u + 16 * threads);
            }
        }
        if (shape->tiles) release_tiles();
#pragma omp barrier
        for (int64_t i = 0; i < count; i++) {
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < passes[i].batch; n++) output_forward(shape, &passes[i], n);
        }
    }
    for (int64_t i = 0; i < count; i++) {
        const Normalization *norm = passes[i].normalization[shape->convolutions + 1];
        if (norm) normalize_output(norm, passes[i].batch, passes[i].q_values);
    }
}

/* What is left of the backward pass. Two kinds of work go on side by side: convolutions are bound by arithmetic, the
 * hidden layer's step by memory, so each thread begins with one of the two and helps with the other. */
typedef struct {
    ConvQueue inputs;
    int64_t next_hidden, next_weight;
} WorkQueue;

#define TAKE(counter) __atomic_fetch_add(&queue->counter, 1, __ATOMIC_RELAXED)
#define LEFT(counter, total) (__atomic_load_n(&queue->counter, __ATOMIC_ACQUIRE) < (total))

/* A pair of observations went through the backward pass of a stage's layers. After the stage's last, the gradients of the
 * next stage's first bias and gain are made, of which its sums' gradients are; after the last stage those that nothing
 * waited for. */
static void finish_inputs(const NetworkShape *shape, const ForwardArgs *args, ConvQueue *queue, int64_t stage) {
    if (!finish_item(&queue->pairs)) return;
    const int last = stage + 1 == queue->pairs.stages;
    for (int64_t l = 0; l < shape->convolutions; l++) {
        const Normalization *norm = args->normalization[l];
        if (norm && (last ? !needs_batch(norm) : l == queue->from[stage + 1]))
            unit_gradients(norm, args->batch, 0, norm->units);
    }
    open_next_stage(&queue->pairs);
}
typedef void HiddenStep(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                        const TrainedLayer *layer, int64_t first, float *rows, const OptimizerStep *step);

/* A thread's share: the gradients by the convolutions' inputs (pairs of observations), then, once all of these are
 * done, by their weights (rows of kernels), and the hidden layer's steps (8 or 16 units each). */
static void work_off(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *back,
                     const TrainedLayer *hidden, WorkQueue *queue, uint8_t *workspace, const OptimizerStep *step) {
    const int64_t units = USES_TILES(shape, TILE_HIDDEN_WEIGHT) ? 16 : 8; /* of a step */
    const int64_t steps = shape->hidden / units;
    HiddenStep *hidden_step = USES_TILES(shape, TILE_HIDDEN_WEIGHT) ? tile_hidden_weight_step : hidden_weight_step;
    int64_t weights = 0, taken;
    for (int64_t l = 0; l < shape->convolutions; l++) weights += shape->convolution[l].kernel;
    while (THREAD % 2 && (taken = TAKE(next_hidden)) < steps)
        hidden_step(shape, args, back, hidden, taken * units, (float *)workspace, step);
    for (;;) {
        if ((taken = take_item(&queue->inputs.pairs)) >= 0) {
            const int64_t stage = taken / queue->inputs.pairs.items, n = taken % queue->inputs.pairs.items * 2;
            conv_input_backward(shape, args, back, queue->inputs.from[stage], n, workspace);
            if (USES_TILES(shape, TILE_CONV_WEIGHT) && stage + 1 == queue->inputs.pairs.stages)
                transpose_conv_gradient(shape, back, n);
            finish_inputs(shape, args, &queue->inputs, stage);
        } else if (all_done(&queue->inputs.pairs) && LEFT(next_weight, weights)) {
            if ((taken = TAKE(next_weight)) >= weights) continue;
            int64_t l = 0;
            for (int64_t lines; taken >= (lines = shape->convolution[l].kernel); l++) taken -= lines;
            if (USES_TILES(shape, TILE_CONV_WEIGHT))
                tile_conv_weight_backward(shape, args, back, l, taken, workspace);
            else
                conv_weight_backward(shape, args, back, l, taken);
        } else if (LEFT(next_hidden, steps)) {
            if ((taken = TAKE(next_hidden)) < steps)
                hidden_step(shape, args, back, hidden, taken * units, (float *)workspace, step);
        } else if (!LEFT(next_weight, weights)) {
            return;
        } else {
            spin_pause(); /* another thread is still at the last gradient by an input */
        }
    }
}

/* From dL/dQ to the next weights. `layers` are the convolutions, the hidden and the output layer. */
void network_backward_and_step(const NetworkShape *shape, const ForwardArgs *args, const BackwardArgs *given,
                       const TrainedLayer *layers, uint8_t *workspace, int64_t threads,
                               const OptimizerStep *step) {
    const TrainedLayer *hidden = &layers[shape->convolutions], *output = hidden + 1;
    const Normalization *of_hidden = args->normalization[shape->convolutions];
    const Normalization *of_output = args->normalization[shape->convolutions + 1];
    BackwardArgs by_sums = *given; /* with the gradient by the output layer's sums in place of dL/dQ */
    const BackwardArgs *back = &by_sums;
    if (of_output) {
        output_sums_gradient(of_output, args->batch, given->q_gradient);
        by_sums.q_gradient = of_output->gradient;
    }
    WorkQueue queue = {backward_queue(shape, args), 0, 0};
#pragma omp parallel num_threads(threads)
    {
        uint8_t *mine = workspace + THREAD * shape->workspace_bytes;
        if (shape->tiles) configure_tiles();
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t action = 0; action < shape->actions; action++) output_backward(shape, args, back, output, action);
        if (of_hidden) {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < args->batch; n++) hidden_output_gradient(shape, args, back->q_gradient, n);
#pragma omp for schedule(static)
            for (int64_t u = 0; u < shape->hidden; u += 16) unit_gradients(of_hidden, args->batch, u, 16);
#pragma omp for schedule(static)
            for (int64_t n = 0; n < args->batch; n += 2) hidden_sums_gradient(shape, args, back, n);
        } else {
#pragma omp for schedule(static)
            for (int64_t n = 0; n < args->batch; n += 2) hidden_backward(shape, args, back, n);
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t k = 0; k < shape->flat; k += 32)
            (USES_TILES(shape, TILE_FLAT_BACKWARD) ? tile_flat_backward : flat_backward)(shape, args, back, k,
                                                                                        k + 32 * threads, mine);
        if (hidden->weight_kind == WEIGHT_SPECTRAL) find_hidden_alignment(shape, args, back, hidden);
        work_off(shape, args, back, hidden, &queue, mine, step);
        if (shape->tiles) release_tiles();
#pragma omp barrier
        for (int64_t l = 0; l < shape->convolutions + 2; l++)
            if (layers[l].weight_kind == WEIGHT_SPECTRAL && &layers[l] != hidden)
                find_alignment(&layers[l], (float *)mine);
        for (int64_t l = 0; l < shape->convolutions; l++) {
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t unit = 0; unit < layers[l].units; unit += 16)
                conv_step(&layers[l], shape->precision, unit, mine, step);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t unit = 0; unit < output->units; unit++)
            gather_step_and_pack_unit(output, unit, (float *)mine, step);
    }
    for (int64_t l = 0; l < shape->convolutions + 2; l++)
        if (needs_batch(args->normalization[l])) update_running_statistics(args->normalization[l], args->batch);
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* One update: passes[0] is the target network on the next observations, passes[1] the network on the observations.
 * Returns the loss; if it is not finite, and that is not allowed, no weight has changed. Without `replay` the
 * transitions are in `loss` already. */
static float update_once(const NetworkShape *shape, const ForwardArgs *passes, const ReplayStorage *replay,
                         const int64_t *indices, const TDLossArgs *loss, const BackwardArgs *back,
                         const TrainedLayer *layers, uint8_t *workspace, int64_t threads,
                         const OptimizerStep *step) {
    const double start = seconds();
    if (replay) gather_transitions(replay, indices, passes[1].batch, loss);
    const double gathered = seconds();
    prepare_training_pass(layers, shape->convolutions + 2, threads);
    network_forward(shape, passes, 2, workspace, threads);
    const float value = td_loss(loss, passes[1].batch, shape->actions, passes[1].q_values, passes[0].q_values);
    const double halfway = seconds();
    if (loss->allow_nonfinite || isfinite(value))
        network_backward_and_step(shape, &passes[1], back, layers, workspace, threads, step);
    loss->stage_seconds[0] += gathered - start;
    loss->stage_seconds[1] += halfway - gathered;
    loss->stage_seconds[2] += seconds() - halfway;
    return value;
}

/* `count` updates, each with a step and a row of `indices`, (count, batch), of its own, until one is refused.
 * Returns how many were made, and in `last_loss` the last loss; -1, and none is made, where a transition or an
 * action does not exist. The hidden layer's input goes to args->flat and to `spare_flat` alternately, so after a
 * refused update that of the one before is still there. */
int64_t network_updates(const NetworkShape *shape, const ForwardArgs *passes, const ReplayStorage *replay,
               const int64_t *indices, int64_t count, const TDLossArgs *loss, const BackwardArgs *back,
               const TrainedLayer *layers, uint8_t *workspace, int64_t threads, const OptimizerStep *steps, void *spare_flat, float *last_loss) {
    ForwardArgs both[2] = {passes[0], passes[1]}, *own = &both[1];
    int32_t **saved = &own->saved_input[shape->convolutions];
    const int same_memory = (void *)*saved == own->flat; /* where a word is one element */
    if (!validate_indices(replay, indices, count * own->batch, loss, shape->actions)) return -1;
    for (int64_t made = 0; made < count; made++) {
        *last_loss = update_once(shape, both, replay, replay ? indices + made * own->batch : NULL, loss, back, layers,
                                 workspace, threads, steps + made);
        if (!loss->allow_nonfinite && !isfinite(*last_loss)) return made;
        void *next = own->flat == passes[1].flat ? spare_flat : passes[1].flat;
        own->flat = next;
        if (same_memory) *saved = next;
    }
    return count;
}
#endif
