/* The transitions of a minibatch from replay, and the Huber loss of their TD errors. Scalar code: B numbers each. */
#include "td_loss.h"
#include <math.h>
#include <string.h>

/* Whether all transitions exist and the network has all actions that were taken; without `replay` the actions are those
 * in `loss`. */
int validate_indices(const ReplayStorage *replay, const int64_t *indices, int64_t count, const TDLossArgs *loss,
                     int64_t actions) {
    for (int64_t n = 0; n < count; n++) {
        if (replay && indices[n] < 0) return 0;
        const int64_t action =
            replay ? replay->actions[replay->entry_of[indices[n] % replay->capacity]] : loss->actions[n];
        if (action < 0 || action >= actions) return 0;
    }
    return 1;
}

/* Gather actions, rewards, terminals and frame indices of transitions into `loss`. Of entry e, frame f = 0, ...,
 * frames of its two observations is that of entry e - (frames - 1 - f) * num_envs, or black where that is before the
 * episode. */
void gather_transitions(const ReplayStorage *replay, const int64_t *indices, int64_t batch, const TDLossArgs *loss) {
    for (int64_t n = 0; n < batch; n++) {
        const int64_t entry = replay->entry_of[indices[n] % replay->capacity];
        for (int64_t f = 0; f <= replay->frames; f++) {
            const int64_t steps_back = replay->frames - 1 - f; /* -1: the frame that followed */
            const int64_t frame = (entry - steps_back * replay->num_envs + replay->capacity) % replay->capacity;
            loss->frame_indices[n * (replay->frames + 1) + f] =
                replay->age[entry] < steps_back ? replay->capacity : frame;
        }
        loss->actions[n] = replay->actions[entry];
        loss->rewards[n] = replay->rewards[entry];
        loss->terminals[n] = replay->terminals[entry];
    }
}

/* The Huber loss (delta = 1) of the TD error d = r + gamma max_a Q'(s', a) (1 - terminal) - Q(s, a), r clipped, and its
 * gradient dL/dQ(s, a) = -clip(d, -1, 1), which is zero for the other actions. Returns the loss; NaN stays NaN.
 * q_values and next_q_values are (batch, actions). */
float td_loss(const TDLossArgs *loss, int64_t batch, int64_t actions, const float *q_values,
              const float *next_q_values) {
    const float clip = loss->reward_clip;
    float losses = 0.0f, errors = 0.0f, values = 0.0f;
    for (int64_t n = 0; n < batch; n++) {
        const float *next = next_q_values + n * actions;
        float best = next[0], reward = loss->rewards[n];
        for (int64_t action = 1; action < actions; action++)
            if (next[action] > best || next[action] != next[action]) best = next[action];
        if (clip > 0.0f && reward > clip) reward = clip;
        if (clip > 0.0f && reward < -clip) reward = -clip;
        const float value = q_values[n * actions + loss->actions[n]];
        /* Times zero rather than left out: a target network that is not finite shows at terminals too. */
        const float target = reward + loss->gamma * best * (float)!loss->terminals[n];
        const float error = target - value, size = fabsf(error);
        const float slope = error > 1.0f ? -1.0f : error < -1.0f ? 1.0f : -error;
        losses += size < 1.0f ? 0.5f * error * error : size - 0.5f;
        errors += size;
        values += value;
        float *gradient = loss->q_gradient + n * actions;
        memset(gradient, 0, actions * sizeof(float));
        gradient[loss->actions[n]] = loss->mean ? slope / (float)batch : slope;
    }
    if (loss->allow_nonfinite || isfinite(losses)) {
        loss->sums[0] += losses / (float)batch;
        loss->sums[1] += errors / (float)batch;
        loss->sums[2] += values / (float)batch;
    }
    return loss->mean ? losses / (float)batch : losses;
}
