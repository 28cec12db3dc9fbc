/* Work that threads share out in stages: a stage begins when all of the one before is done. */
#ifndef STAGES_H
#define STAGES_H
#include <stdint.h>

typedef struct {
    int64_t stages, items; /* `items` of each stage */
    int64_t next, done;    /* items that were taken and items that are done, of all stages */
    int64_t open;          /* stages of which items may be taken; stages + 1: all is done */
} StagedQueue;

static inline StagedQueue staged_queue(int64_t stages, int64_t items) {
    const StagedQueue queue = {stages, items, 0, 0, items ? 1 : stages + 1};
    return queue;
}

static inline int all_done(StagedQueue *queue) {
    return __atomic_load_n(&queue->open, __ATOMIC_ACQUIRE) > queue->stages;
}

/* Take an item, whose number counts through all stages; -1: at the moment there is none. */
static inline int64_t take_item(StagedQueue *queue) {
    int64_t next = __atomic_load_n(&queue->next, __ATOMIC_RELAXED);
    do {
        const int64_t open = __atomic_load_n(&queue->open, __ATOMIC_ACQUIRE);
        if (next >= queue->items * (open < queue->stages ? open : queue->stages)) return -1;
    } while (!__atomic_compare_exchange_n(&queue->next, &next, next + 1, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return next;
}

/* An item is done. Returns whether it was the last of its stage: then the caller makes what lies between two stages, and
 * calls open_next_stage. */
static inline int finish_item(StagedQueue *queue) {
    return __atomic_add_fetch(&queue->done, 1, __ATOMIC_ACQ_REL) % queue->items == 0;
}

static inline void open_next_stage(StagedQueue *queue) { __atomic_fetch_add(&queue->open, 1, __ATOMIC_RELEASE); }
#endif
