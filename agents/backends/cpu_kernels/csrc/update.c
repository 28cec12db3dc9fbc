/* A Q-network's passes, written for processors with vectors of 512 bits; agents/passes.py calls them.
 *
 * Each number is computed by one thread in one order, so no result depends on the number of threads.
 */
#include "structs.h"
#include <time.h>
#if defined(__AVX512F__) && defined(__BMI2__)
#include <immintrin.h>

#define MOST_CONVOLUTIONS 8
#define MOST_FRAMES 64
#define MOST_LINES 64
#define LARGEST_TILE 12
#define NEAREST 49152 /* bytes of the nearest cache */
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef struct {
    int64_t height, width, channels; /* of the input, the first layer's as blocks */
    int64_t kernel, stride;
    int64_t down, across, units;     /* of the output */
} Convolution;

typedef struct {
    int64_t convolutions;
    Convolution convolution[MOST_CONVOLUTIONS];
    int64_t stack, block;            /* frames of an observation; pixels of a block's side */
    int64_t flat, hidden, actions;   /* inputs and units of the dense layers */
    int64_t largest;                 /* numbers in the largest of the arrays that scratch holds */
    int64_t most_places;             /* in its lists */
    int64_t scratch;                 /* bytes of a thread's scratch */
} Shape;

typedef struct {
    const int32_t *weight[MOST_CONVOLUTIONS]; /* words (kernel, kernel, channels / pair, units) */
    const float *bias[MOST_CONVOLUTIONS];
    const void *dense;                        /* elements (hidden, flat) */
    const float *dense_bias;
    const float *output, *output_bias;        /* (actions, hidden), (actions) */
    const uint8_t *frames;                    /* (any, height, width) */
    const int64_t *places;                    /* which frames an observation has: place_step numbers further each */
    int64_t place_step, batch;
    int32_t *seen[MOST_CONVOLUTIONS + 1];     /* words (batch / pair, pixels, channels) that a layer saw; NULL: not kept */
    uint64_t *lit;                            /* (batch / pair, height): a bit for each of the first layer's pixels, which
                                                 are blocks; those that are not lit are zero, and not written to seen[0] */
    void *flat;                               /* elements (batch, flat) */
    float *hidden, *q_values;                 /* (batch, hidden), (batch, actions) */
} Pass;

typedef struct {
    const int32_t *weight[MOST_CONVOLUTIONS]; /* words (stride, stride, taps, taps, units / pair, channels), kernel turned */
    const float *q_gradient;                  /* (batch, actions) */
    void *hidden;                             /* elements (batch, hidden): the gradient by the dense layer's sums */
    int32_t *hidden_words;                    /* words (batch / pair, hidden): the same */
    float *flat;                              /* (batch, flat): by what it saw */
    int32_t *words[MOST_CONVOLUTIONS];        /* words (batch / pair, pixels, units): by each convolution's sums */
    float *gradient[MOST_CONVOLUTIONS];       /* (kernel, kernel, channels, units): by its weights */
    float *bias_gradient[MOST_CONVOLUTIONS];
} Back;

/* What a replay keeps of each entry; the frames are those of a Pass. */
typedef struct {
    const int64_t *entry_of;                  /* of each number, modulo `entries` */
    const uint8_t *age, *actions, *terminals; /* (entries) each */
    const float *rewards;
    int64_t entries, num_envs, stack;
} Store;

/* What of the transitions of a minibatch is not in the frames, and the loss. */
typedef struct {
    int64_t *places;        /* (batch, stack + 1): of both passes, written from the store; else unused */
    int64_t *actions;       /* (batch) each */
    float *rewards;
    uint8_t *terminals;
    float *q_gradient;      /* (batch, actions), written: the loss's by the Q-values */
    double *sums;           /* to these are added the means of loss, |TD error| and Q-value */
    double *seconds;        /* and to these what looking up, the way forward, and the way back with the step took */
    float gamma, clip;      /* of the rewards; 0: as they are */
    int64_t mean;           /* 1: the loss is the mean over the minibatch, 0: the sum */
    int64_t unchecked;      /* 1: a loss that is not finite is no reason to stop */
} Objective;

/* What of the way back is left to do. Two kinds of work go on side by side: convolutions keep a core busy, the dense
 * layer's step the memory, so each thread begins with one of the two and helps with the other. */
typedef struct {
    int64_t next_back, done_back, next_dense, next_kernel;
} Queue;

#define TAKE(counter) __atomic_fetch_add(&queue->counter, 1, __ATOMIC_RELAXED)
#define LEFT(counter, total) (__atomic_load_n(&queue->counter, __ATOMIC_ACQUIRE) < (total))

/* Frames that are asked for while something else is computed, some lines of the cache at a time. */
typedef struct {
    const uint8_t *frames[2 * MOST_FRAMES];
    int64_t count, bytes, next, share;
} Ahead;

/* Where and over what sums are taken: at (y, x), `lines` lines of `length` words from y * down_step + x * across_step. */
typedef struct {
    int64_t down, across, down_step, across_step, lines, pitch, length;
    int64_t border, inner; /* lines above that are zero, and how many are not; 0: none is known to be */
} Window;

/* Where words begin over which sums are taken, and where the sums go. */
typedef struct {
    const int32_t **at;
    float **out;
    int64_t count;
} Places;

/* Transpose 16 by 16. */
ALWAYS_INLINE void turn(__m512 *block) {
    UNROLL for (int size = 1; size < 16; size *= 2) {
        /* Blocks of `size` change places across the diagonal: even ones come from the first row, odd from the second. */
        const __m512i each = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        const __mmask16 odd = _mm512_test_epi32_mask(each, _mm512_set1_epi32(size));
        const __m512i upper = _mm512_mask_add_epi32(each, odd, each, _mm512_set1_epi32(16 - size));
        const __m512i lower = _mm512_mask_add_epi32(_mm512_add_epi32(each, _mm512_set1_epi32(size)), odd, each,
                                                    _mm512_set1_epi32(16));
        UNROLL for (int i = 0; i < 16; i++) {
            if (i & size) continue;
            const __m512 first = block[i], second = block[i + size];
            block[i] = _mm512_permutex2var_ps(first, upper, second);
            block[i + size] = _mm512_permutex2var_ps(first, lower, second);
        }
    }
}

/* Whether there are such transitions, and the network has all actions that were taken. */
static int exist(const Store *store, const int64_t *numbers, int64_t count, const Objective *objective, int64_t actions) {
    for (int64_t n = 0; n < count; n++) {
        if (store && numbers[n] < 0) return 0;
        const int64_t action = store ? store->actions[store->entry_of[numbers[n] % store->entries]] : objective->actions[n];
        if (action < 0 || action >= actions) return 0;
    }
    return 1;
}

/* Look up transitions by number, with the places of their frames: the one after the last entry is black. */
static void look_up(const Store *store, const int64_t *numbers, int64_t batch, const Objective *objective) {
    for (int64_t n = 0; n < batch; n++) {
        const int64_t entry = store->entry_of[numbers[n] % store->entries];
        for (int64_t f = 0; f <= store->stack; f++) {
            const int64_t back = store->stack - 1 - f; /* rows before the entry's; one after it is -1 */
            const int64_t place = (entry - back * store->num_envs + store->entries) % store->entries;
            objective->places[n * (store->stack + 1) + f] = store->age[entry] < back ? store->entries : place;
        }
        objective->actions[n] = store->actions[entry];
        objective->rewards[n] = store->rewards[entry];
        objective->terminals[n] = store->terminals[entry];
    }
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* The loss of Q-learning with clipped TD errors and its gradient by the Q-values; what is not a number stays so. */
static float lose(const Objective *objective, int64_t batch, int64_t actions, const float *q_values,
                  const float *next_q_values) {
    float losses = 0.0f, errors = 0.0f, values = 0.0f;
    for (int64_t n = 0; n < batch; n++) {
        const float *next = next_q_values + n * actions;
        float best = next[0], reward = objective->rewards[n];
        for (int64_t action = 1; action < actions; action++)
            if (next[action] > best || next[action] != next[action]) best = next[action];
        if (objective->clip > 0.0f && reward > objective->clip) reward = objective->clip;
        if (objective->clip > 0.0f && reward < -objective->clip) reward = -objective->clip;
        const float value = q_values[n * actions + objective->actions[n]];
        /* Times zero and not left out: a target network that has gone wrong shows at an end too. */
        const float target = reward + objective->gamma * best * (float)!objective->terminals[n];
        const float error = target - value, size = fabsf(error);
        const float slope = error > 1.0f ? -1.0f : error < -1.0f ? 1.0f : -error;
        losses += size < 1.0f ? 0.5f * error * error : size - 0.5f;
        errors += size;
        values += value;
        float *gradient = objective->q_gradient + n * actions;
        memset(gradient, 0, actions * sizeof(float));
        gradient[objective->actions[n]] = objective->mean ? slope / (float)batch : slope;
    }
    if (objective->unchecked || isfinite(losses)) {
        objective->sums[0] += losses / (float)batch;
        objective->sums[1] += errors / (float)batch;
        objective->sums[2] += values / (float)batch;
    }
    return objective->mean ? losses / (float)batch : losses;
}

/* Bits [0, count). */
static inline uint64_t first_bits(int64_t count) { return count < 64 ? ((uint64_t)1 << count) - 1 : ~(uint64_t)0; }

/* Turn which inputs of a convolution are lit, a bit each and line by line, into which of its places see one that is. */
static void spread(const Convolution *conv, uint64_t *lit) {
    uint64_t every = 0;
    for (int64_t x = 0; x < conv->across; x++) every |= (uint64_t)1 << x * conv->stride;
    for (int64_t y = 0; y < conv->down; y++) {
        uint64_t any = 0, seen = 0;
        for (int64_t tap = 0; tap < conv->kernel; tap++) any |= lit[y * conv->stride + tap];
        for (int64_t tap = 0; tap < conv->kernel; tap++) seen |= any >> tap;
        lit[y] = _pext_u64(seen, every);
    }
}

/* List the places of a convolution of `words`; of those that see nothing lit, which all have the same sums, only one. */
static void list_places(const Convolution *conv, const int32_t *words, int64_t channel_words, const uint64_t *lit,
                        float *out, Places *places) {
    int dark = 0;
    for (int64_t y = 0; y < conv->down; y++, out += conv->across * conv->units) {
        uint64_t wanted = lit[y], rest = first_bits(conv->across) & ~wanted;
        if (rest && !dark++) wanted |= rest & -rest;
        for (; wanted; wanted &= wanted - 1) {
            const int64_t x = __builtin_ctzll(wanted);
            places->at[places->count] = words + (y * conv->width + x) * conv->stride * channel_words;
            places->out[places->count++] = out + x * conv->units;
        }
    }
}

/* Copy the sums of the first place that sees nothing lit to all others. */
static void copy_dark(const Convolution *conv, const uint64_t *lit, float *out) {
    const float *first = NULL;
    for (int64_t y = 0; y < conv->down; y++, out += conv->across * conv->units) {
        for (uint64_t dark = first_bits(conv->across) & ~lit[y]; dark; dark &= dark - 1) {
            float *place = out + __builtin_ctzll(dark) * conv->units;
            if (!first) first = place;
            for (int64_t u = 0; u < conv->units; u += 16) _mm512_storeu_ps(place + u, _mm512_loadu_ps(first + u));
        }
    }
}

/* List where one tap of the first layer's kernel sees blocks that are lit, in `count` lines of places: how far on the
 * blocks and the sums are. Returns how many, -1 where all are lit. */
static int64_t list_lit(const Convolution *conv, const uint64_t *lit, int64_t count, int64_t tap, int32_t (*places)[2]) {
    const uint64_t all = first_bits(conv->across);
    int64_t there = 0, dark = 0;
    for (int64_t y = 0; y < count; y++) dark |= (lit[y] >> tap & all) != all;
    if (!dark) return -1;
    for (int64_t y = 0; y < count; y++) {
        for (uint64_t left = lit[y] >> tap & all; left; left &= left - 1) {
            const int64_t x = __builtin_ctzll(left);
            places[there][0] = (int32_t)((y * conv->width + x) * conv->channels);
            places[there++][1] = (int32_t)((y * conv->across + x) * conv->units);
        }
    }
    return there;
}

/* Load 16 words that are used several times: left to itself, gcc loads them for each use, more than a core can. */
ALWAYS_INLINE __m512i held(const int32_t *words) {
    __m512i vector = _mm512_loadu_si512(words);
    __asm__("" : "+v"(vector));
    return vector;
}

/* Ask for `count` words that will be read soon, and go on behind them; words that nobody owns do no harm. */
static inline void fetch(const int32_t **words, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(*words + i, 0, 2);
    *words += count;
}

static inline void look_ahead(Ahead *ahead) {
    for (int64_t i = 0; i < ahead->share && ahead->count; i++) {
        __builtin_prefetch(ahead->frames[ahead->count - 1] + ahead->next, 0, 2);
        ahead->next += 64;
        if (ahead->next >= ahead->bytes) {
            ahead->next = 0;
            ahead->count--;
        }
    }
}

#define LOW 0
#define PAIR 1
#define ONE 0x3f800000
#define Element float
#define NAME(f) f##_float32
#include "passes.h"
#undef LOW
#undef PAIR
#undef ONE
#undef Element
#undef NAME

#ifdef __AVX512BF16__
static const uint16_t FIRST_OF_PAIRS[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
static const uint16_t LAST_OF_PAIRS[32] = {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                           24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
#define LOW 1
#define PAIR 2
#define ONE 0x3f803f80
#define Element uint16_t
#define NAME(f) f##_bfloat16
#include "passes.h"
#endif

int64_t shape_size(void) { return sizeof(Shape); }
int64_t pass_size(void) { return sizeof(Pass); }
int64_t back_size(void) { return sizeof(Back); }
int64_t store_size(void) { return sizeof(Store); }
int64_t objective_size(void) { return sizeof(Objective); }
#endif
