/* uint8 frames as blocks of pixels, the input of the first convolution; see frames.c. */
#ifndef FRAMES_H
#define FRAMES_H
#include "structs.h"

void pack_block_row(const uint8_t *const *frames, int64_t start, int64_t count, int64_t width, int64_t block,
                    int64_t bfloat16, void *packed);
/* conv_forward.c */
void pack_bfloat16_observation(const NetworkShape *shape, const uint8_t *const *frames, void *packed, uint64_t *nonzero);

/* Frames that are prefetched while something else is computed, some cache lines at a time. */
typedef struct {
    const uint8_t *frames[2 * MAX_FRAMES];
    int64_t count, bytes, next, share;
} FramePrefetch;

static inline void prefetch_frames(FramePrefetch *ahead) {
    for (int64_t i = 0; i < ahead->share && ahead->count; i++) {
        __builtin_prefetch(ahead->frames[ahead->count - 1] + ahead->next, 0, 2);
        ahead->next += 64;
        if (ahead->next >= ahead->bytes) {
            ahead->next = 0;
            ahead->count--;
        }
    }
}

/* The frames of observation n, oldest first. */
static inline void find_frames(const NetworkShape *shape, const ForwardArgs *args, int64_t n, int64_t frame_bytes,
                               const uint8_t **frames) {
    for (int64_t f = 0; f < shape->frames; f++)
        frames[f] = args->frames + args->frame_indices[n * args->frame_index_stride + f] * frame_bytes;
}
#endif
