/* The forward and backward pass, once for each precision: included by passes.c with LOW defined as 0 or 1.
 *
 * The unit of data is a *word* of four bytes: a float, or two bfloat16 that are multiplied and added as a pair. Sums run
 * over channels forward, over units on the way back to a layer's input, over pixels and observations for a weight's
 * gradient; so a pair is two channels, two units, or the same value of two observations. Vectors lie along what is left.
 */

/* acc + a * b for a vector of words: pairs are multiplied and summed. */
static inline __m512 NAME(multiply_add)(__m512 acc, int32_t a, __m512i b) {
#if LOW
    return _mm512_dpbf16_ps(acc, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#else
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(a)), _mm512_castsi512_ps(b), acc);
#endif
}

static inline __m512 NAME(multiply_add_vectors)(__m512 acc, __m512i a, __m512i b) {
#if LOW
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), acc);
#endif
}

/* Store 16 values as elements. */
static inline void NAME(store)(Element *out, __m512 values) {
#if LOW
    _mm256_storeu_si256((__m256i *)out, (__m256i)_mm512_cvtneps_pbh(values));
#else
    _mm512_storeu_ps(out, values);
#endif
}

/* Store 16 values of two observations, n and n + 1, as words that pair them; where words hold one, `next` is the second's. */
static inline void NAME(store_words)(int32_t *out, int32_t *next, __m512 first, __m512 second) {
#if LOW
    (void)next;
    __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
    __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
    _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
    _mm512_storeu_ps(out, first);
    if (next) _mm512_storeu_ps(next, second);
#endif
}

/* One value of two observations as a word. */
static inline void NAME(store_word)(int32_t *out, int32_t *next, Element first, Element second) {
#if LOW
    (void)next;
    *out = (int32_t)((uint32_t)first | (uint32_t)second << 16);
#else
    memcpy(out, &first, 4);
    if (next) memcpy(next, &second, 4);
#endif
}

static inline Element NAME(element)(float value) {
#if LOW
    return rounded(value);
#else
    return value;
#endif
}

/* pack_strip for blocks of 4 x 4 pixels and frames by fours: a block's line of pixels is a word, 16 lines are turned.
 * Returns a bit for each block that has a pixel that is not black. */
static uint64_t NAME(pack_fours)(const uint8_t *const *frames, int64_t start, int64_t stack, int64_t width,
                                 Element *packed) {
    uint64_t lit = 0;
    const int64_t across = width / 4, channels = stack * 16;
    for (int64_t f = 0; f < stack; f += 4) {
        for (int64_t x = 0; x < across; x += 16) {
            const int64_t count = across - x < 16 ? across - x : 16;
            __m512 block[16];
            UNROLL for (int i = 0; i < 16; i++) {
                const uint8_t *line = frames[f + i / 4] + start + i % 4 * width + 4 * x;
                block[i] = _mm512_maskz_loadu_ps((__mmask16)((1 << count) - 1), line);
            }
            turn(block);
            Element *out = packed + x * channels + f * 16;
            for (int64_t j = 0; j < count; j++, out += channels) {
                uint8_t pixels[64];
                const __m512i words = _mm512_castps_si512(block[j]);
                lit |= (uint64_t)(_mm512_test_epi32_mask(words, words) != 0) << (x + j);
                _mm512_storeu_ps(pixels, block[j]);
                for (int i = 0; i < 64; i += 16) {
                    const __m512i whole = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(pixels + i)));
                    NAME(store)(out + i, _mm512_cvtepi32_ps(whole));
                }
            }
        }
    }
    return lit;
}

/* Sums at `count` places and for `vectors` * 16 units, over lines of `length` words. */
ALWAYS_INLINE void NAME(tile)(const int count, const int vectors, const int32_t *const *at, int64_t lines,
                              int64_t pitch, int64_t length, const int32_t *weight, int64_t units, float *const *out) {
    __m512 sum[LARGEST_TILE][4];
    UNROLL for (int p = 0; p < count; p++) UNROLL for (int v = 0; v < vectors; v++) sum[p][v] = _mm512_setzero_ps();
    for (int64_t line = 0; line < lines; line++) {
        const int64_t start = line * pitch;
        for (int64_t w = 0; w < length; w++) {
            __m512i b[4];
            UNROLL for (int v = 0; v < vectors; v++) b[v] = held(weight + 16 * v);
            UNROLL for (int p = 0; p < count; p++) {
                const int32_t a = at[p][start + w];
                UNROLL for (int v = 0; v < vectors; v++) sum[p][v] = NAME(multiply_add)(sum[p][v], a, b[v]);
            }
            weight += units;
        }
    }
    UNROLL for (int p = 0; p < count; p++) {
        UNROLL for (int v = 0; v < vectors; v++) _mm512_storeu_ps(out[p] + 16 * v, sum[p][v]);
    }
}

/* Tiles of `count` pixels of each of two observations from number `from` on; returns the first that is left over. */
ALWAYS_INLINE int64_t NAME(tiles)(const int count, const int vectors, int64_t from, int64_t to, const Window *window,
                                  const int32_t *first, const int32_t *second, const int32_t *weight, int64_t units,
                                  float *out, float *out_second) {
    int64_t line = 0, lines = window->lines;
    if (window->border) {
        const int64_t y = from / window->across, end = window->border + window->inner - y;
        line = window->border > y ? window->border - y : 0;
        lines = (end < lines ? end : lines) - line;
    }
    first += line * window->pitch;
    second += line * window->pitch;
    weight += line * window->length * units;
    for (; from + count <= to; from += count) {
        const int32_t *at[LARGEST_TILE];
        float *places[LARGEST_TILE];
        for (int p = 0; p < count; p++) {
            const int64_t y = (from + p) / window->across, x = (from + p) % window->across;
            const int64_t offset = y * window->down_step + x * window->across_step;
            at[2 * p] = first + offset;
            at[2 * p + 1] = second + offset;
            places[2 * p] = out + (from + p) * units;
            places[2 * p + 1] = out_second + (from + p) * units;
        }
        NAME(tile)(2 * count, vectors, at, lines, window->pitch, window->length, weight, units, places);
    }
    return from;
}

/* The window's sums over two observations at all places: float32 (down * across, units) each. */
static void NAME(convolve)(const Window *window, const int32_t *first, const int32_t *second, const int32_t *weight,
                           int64_t units, float *out, float *out_second) {
    const int64_t pixels = window->down * window->across;
    /* Where lines are known to be zero each line of places leaves out its own. */
    const int64_t band = window->border ? window->across : pixels;
    int64_t u = 0, p, from;
#define BANDS for (from = 0; from < pixels; from += band)
#define REST from + band, window, first, second, weight + u, units, out + u, out_second + u
    for (; u + 64 <= units; u += 64) BANDS {
        p = NAME(tiles)(3, 4, from, REST);
        NAME(tiles)(1, 4, p, REST);
    }
    for (; u + 32 <= units; u += 32) BANDS {
        p = NAME(tiles)(5, 2, from, REST);
        NAME(tiles)(1, 2, p, REST);
    }
    for (; u < units; u += 16) BANDS {
        p = NAME(tiles)(6, 1, from, REST);
        NAME(tiles)(1, 1, p, REST);
    }
#undef REST
#undef BANDS
}

/* Sums at listed places, over `lines` lines of `length` words: float32, `units` at each. */
ALWAYS_INLINE void NAME(listed)(const int count, const int vectors, const Places *places, int64_t lines, int64_t pitch,
                                int64_t length, const int32_t *weight, int64_t units, int64_t u, Ahead *ahead) {
    for (int64_t from = 0; from < places->count; from += count) {
        /* The last tile visits places of the one before it again, and finds the same. */
        const int64_t start = from + count <= places->count ? from : places->count > count ? places->count - count : 0;
        const int32_t *at[LARGEST_TILE];
        float *out[LARGEST_TILE];
        for (int p = 0; p < count; p++) {
            at[p] = places->at[start + p];
            out[p] = places->out[start + p] + u;
        }
        if (ahead) look_ahead(ahead);
        NAME(tile)(count, vectors, at, lines, pitch, length, weight + u, units, out);
    }
}

/* By themselves: within a larger function gcc may run out of registers. */
#define SUMS const Places *p, int64_t n, int64_t pitch, int64_t length, const int32_t *w, int64_t units, int64_t u, Ahead *a
static __attribute__((noinline)) void NAME(listed_64)(SUMS) {
    NAME(listed)(6, 4, p, n, pitch, length, w, units, u, a);
}
static __attribute__((noinline)) void NAME(listed_32)(SUMS) {
    NAME(listed)(10, 2, p, n, pitch, length, w, units, u, a);
}
static __attribute__((noinline)) void NAME(listed_16)(SUMS) {
    NAME(listed)(12, 1, p, n, pitch, length, w, units, u, a);
}
#undef SUMS

/* A bit for each of `count` blocks that has a pixel that is not black. */
static uint64_t NAME(find_lit)(const Element *blocks, int64_t count, int64_t channels) {
    uint64_t lit = 0;
    for (int64_t b = 0; b < count; b++, blocks += channels) {
        __m256i any = _mm256_setzero_si256();
        for (const Element *at = blocks; at < blocks + channels; at += 32 / sizeof(Element))
            any = _mm256_or_si256(any, _mm256_loadu_si256((const __m256i *)at));
        lit |= (uint64_t)!_mm256_testz_si256(any, any) << b;
    }
    return lit;
}

/* Keep a line's blocks that are `lit`, of one observation or of a pair. */
static void NAME(keep_lit)(uint64_t lit, int64_t channels, const Element *in, const Element *in_second, int32_t *words) {
    for (; lit; lit &= lit - 1) {
        const int64_t start = __builtin_ctzll(lit) * channels;
        for (int64_t i = start; i < start + channels; i += 16) {
#if LOW
            __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(in + i)));
            __m512i high = _mm512_setzero_si512();
            if (in_second) high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(in_second + i)));
            _mm512_storeu_si512(words + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
            (void)in_second;
            _mm512_storeu_ps(words + i, _mm512_loadu_ps(in + i));
#endif
        }
    }
}

/* The convolutions for observations n and n + 1 (the same one twice where there is no second). */
static void NAME(convolutions)(const Shape *shape, const Pass *pass, int64_t n, int64_t next, uint8_t *scratch) {
    const int64_t second = n + 1 < pass->batch ? n + 1 : n;
    const Convolution *conv = &shape->convolution[0];
    const int64_t strip = conv->width * conv->channels;
    Element *in = (Element *)scratch, *in_second = in + shape->largest;
    Element *out = in_second + shape->largest, *out_second = out + shape->largest;
    float *sums = (float *)(out_second + shape->largest), *sums_second = sums + shape->largest;
    const int64_t width = conv->width * shape->block, height = conv->height * shape->block;
    Places places = {.at = (const int32_t **)(sums_second + shape->largest)};
    places.out = (float **)(places.at + shape->most_places);
    uint64_t lit[2][MOST_LINES];
    for (int i = 0; i < 2; i++) {
        const uint8_t *frames[MOST_FRAMES];
        for (int64_t f = 0; f < shape->stack; f++)
            frames[f] = pass->frames + pass->places[(i ? second : n) * pass->place_step + f] * width * height;
        for (int64_t y = 0; y < conv->height; y++) {
            Element *packed = (i ? in_second : in) + y * strip;
            if (shape->block == 4 && shape->stack % 4 == 0) {
                lit[i][y] = NAME(pack_fours)(frames, 4 * y * width, shape->stack, width, packed);
            } else {
                pack_strip(frames, y * shape->block * width, shape->stack, width, shape->block, LOW, packed);
                lit[i][y] = NAME(find_lit)(packed, conv->width, conv->channels);
            }
#ifdef VISIT_ALL
            lit[i][y] = first_bits(conv->width);
#endif
        }
    }
    const int64_t group = n / PAIR, pair = second > n;
    if (pass->seen[0]) {
        int32_t *words = pass->seen[0] + group * conv->height * strip;
        uint64_t *kept = pass->lit + group * conv->height;
        for (int64_t y = 0; y < conv->height; y++, words += strip) {
            const Element *line = in + y * strip, *line_second = in_second + y * strip;
            kept[y] = lit[0][y] | (LOW && pair ? lit[1][y] : 0);
            NAME(keep_lit)(kept[y], conv->channels, line, pair ? line_second : NULL, words);
            if (LOW || !pair) continue;
            kept[conv->height + y] = lit[1][y];
            NAME(keep_lit)(lit[1][y], conv->channels, line_second, NULL, words + conv->height * strip);
        }
    }
    /* Frames lie anywhere in memory, so those of the observations that probably follow are asked for. */
    Ahead ahead = {.count = 0, .bytes = width * height, .next = 0};
    for (int64_t i = next; i < next + 2 && i < pass->batch; i++) {
        for (int64_t f = 0; f < shape->stack; f++)
            ahead.frames[ahead.count++] = pass->frames + pass->places[i * pass->place_step + f] * width * height;
    }
    for (int64_t l = 0; l < shape->convolutions; l++) {
        conv = &shape->convolution[l];
        const int64_t channel_words = conv->channels / PAIR, pixels = conv->down * conv->across;
        const int64_t pitch = conv->width * channel_words, length = conv->kernel * channel_words;
        places.count = 0;
        for (int i = 0; i < 2; i++) {
            spread(conv, lit[i]);
            list_places(conv, (const int32_t *)(i ? in_second : in), channel_words, lit[i], i ? sums_second : sums, &places);
        }
        for (int64_t p = places.count; p < LARGEST_TILE; p++) {
            places.at[p] = places.at[0];
            places.out[p] = places.out[0];
        }
        ahead.share = 2 * shape->stack * width * height / 64 / (places.count / 12 + 1) + 1;
#define REST &places, conv->kernel, pitch, length, pass->weight[l], conv->units, u, l ? NULL : &ahead
        int64_t u = 0;
        for (; u + 64 <= conv->units; u += 64) NAME(listed_64)(REST);
        for (; u + 32 <= conv->units; u += 32) NAME(listed_32)(REST);
        for (; u < conv->units; u += 16) NAME(listed_16)(REST);
#undef REST
        for (int i = 0; i < 2; i++)
            copy_dark(conv, lit[i], i ? sums_second : sums);
        const int last = l == shape->convolutions - 1;
        const int64_t size = pixels * conv->units;
        int32_t *words = NULL, *next = NULL;
        if (pass->seen[l + 1]) {
            words = pass->seen[l + 1] + group * size;
            next = pair ? words + size : NULL;
        }
        /* What a dense layer sees stands channel after channel. */
        Element *flat = last ? (Element *)pass->flat + n * size : NULL;
        Element *flat_second = last ? (Element *)pass->flat + second * size : NULL;
        for (int64_t p = 0; p < pixels; p++) {
            for (int64_t u = 0; u < conv->units; u += 16) {
                const int64_t i = p * conv->units + u;
                const __m512 bias = _mm512_loadu_ps(pass->bias[l] + u), zero = _mm512_setzero_ps();
                /* In this order a number that is not one stays so; zero is added to a zero so that it has no sign. */
                __m512 a = _mm512_add_ps(_mm512_max_ps(zero, _mm512_add_ps(_mm512_loadu_ps(sums + i), bias)), zero);
                __m512 b =
                    _mm512_add_ps(_mm512_max_ps(zero, _mm512_add_ps(_mm512_loadu_ps(sums_second + i), bias)), zero);
                if (!last) {
                    NAME(store)(out + i, a);
                    NAME(store)(out_second + i, b);
                    if (words)
                        NAME(store_words)(words + i, next ? next + i : NULL, a, pair ? b : zero);
                } else {
                    _mm512_storeu_ps(sums + i, a);
                    _mm512_storeu_ps(sums_second + i, b);
                }
            }
        }
        if (last) {
            for (int64_t u = 0; u < conv->units; u++) {
                for (int64_t p = 0; p < pixels; p++) {
                    const int64_t i = u * pixels + p;
                    const Element a = NAME(element)(sums[p * conv->units + u]);
                    const Element b = NAME(element)(sums_second[p * conv->units + u]);
                    flat[i] = a;
                    flat_second[i] = b;
                    if (words) NAME(store_word)(words + i, next ? next + i : NULL, a, pair ? b : 0);
                }
            }
        }
        Element *swapped = in;
        in = out;
        out = swapped;
        swapped = in_second;
        in_second = out_second;
        out_second = swapped;
    }
}

/* `units` x `count` dot products over words [from, to) of `words`; `sums` keeps them between two ranges. */
ALWAYS_INLINE void NAME(dots)(const int units, const int count, const int32_t *weight, const int32_t *x, int64_t words,
                              int64_t from, int64_t to, float *sums, const float *bias, float *out, int64_t out_step) {
    __m512 sum[4][6];
    UNROLL for (int u = 0; u < units; u++) {
        UNROLL for (int n = 0; n < count; n++)
            sum[u][n] = from ? _mm512_loadu_ps(sums + 16 * (u * count + n)) : _mm512_setzero_ps();
    }
    for (int64_t k = from; k < to; k += 16) {
        __m512i a[4];
        UNROLL for (int u = 0; u < units; u++) a[u] = held(weight + u * words + k);
        UNROLL for (int n = 0; n < count; n++) {
            const __m512i b = held(x + n * words + k);
            UNROLL for (int u = 0; u < units; u++) sum[u][n] = NAME(multiply_add_vectors)(sum[u][n], a[u], b);
        }
    }
    UNROLL for (int u = 0; u < units; u++) {
        UNROLL for (int n = 0; n < count; n++) {
            if (to < words) {
                _mm512_storeu_ps(sums + 16 * (u * count + n), sum[u][n]);
            } else {
                const float value = _mm512_reduce_add_ps(sum[u][n]) + bias[u];
                out[n * out_step + u] = value < 0.0f ? 0.0f : value;
            }
        }
    }
}

/* The dense hidden layer's units [from, from + 16) for all observations, which are taken by so many and over so many
 * inputs at a time that they stay in the nearest cache for all of these units. */
static void NAME(dense)(const Shape *shape, const Pass *pass, int64_t from, int64_t next) {
    const int64_t words = shape->flat / PAIR, range = NEAREST / 3 / (6 * sizeof(int32_t)) / 16 * 16;
    const int32_t *weight = (const int32_t *)pass->dense + from * words, *x = (const int32_t *)pass->flat;
    float sums[4][24 * 16];
    const int32_t *ahead = (const int32_t *)pass->dense + (next < shape->hidden ? next : from) * words;
    const int64_t share = 16 * words / (4 * (pass->batch / 6 + 1) * ((words + range - 1) / range)) + 16;
    for (int64_t n = 0; n < pass->batch;) {
        const int64_t count = n + 6 <= pass->batch ? 6 : n + 2 <= pass->batch ? 2 : 1;
        for (int64_t k = 0; k < words; k += range) {
            const int64_t to = k + range < words ? k + range : words;
            for (int64_t u = 0; u < 16; u += 4) {
                const float *bias = pass->dense_bias + from + u;
                float *out = pass->hidden + n * shape->hidden + from + u;
                fetch(&ahead, share);
#define REST weight + u * words, x + n * words, words, k, to, sums[u / 4], bias, out, shape->hidden
                if (count == 6)
                    NAME(dots)(4, 6, REST);
                else if (count == 2)
                    NAME(dots)(4, 2, REST);
                else
                    NAME(dots)(4, 1, REST);
#undef REST
            }
        }
        n += count;
    }
}

/* Q-values of `count` networks' passes. */
void NAME(forward)(const Shape *shape, const Pass *passes, int64_t count, uint8_t *scratch, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        uint8_t *mine = scratch + THREAD * shape->scratch;
        for (int64_t i = 0; i < count; i++) {
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t n = 0; n < passes[i].batch; n += 2)
                NAME(convolutions)(shape, &passes[i], n, n + 2 * threads, mine);
        }
#pragma omp barrier
        for (int64_t i = 0; i < count; i++) {
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t u = 0; u < shape->hidden; u += 16) NAME(dense)(shape, &passes[i], u, u + 16 * threads);
        }
#pragma omp barrier
        for (int64_t i = 0; i < count; i++) {
            const Pass *pass = &passes[i];
#pragma omp for schedule(static) nowait
            for (int64_t n = 0; n < pass->batch; n++) {
                for (int64_t action = 0; action < shape->actions; action++) {
                    const float *h = pass->hidden + n * shape->hidden, *w = pass->output + action * shape->hidden;
                    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
                    for (int64_t u = 0; u < shape->hidden; u++) sum += h[u] * w[u];
                    pass->q_values[n * shape->actions + action] = sum + pass->output_bias[action];
                }
            }
        }
    }
}

/* The gradient by the dense hidden layer's sums, of observations n and n + 1. */
static void NAME(hidden_gradient)(const Shape *shape, const Pass *pass, const Back *back, int64_t n) {
    const int64_t pair = n + 1 < pass->batch, hidden = shape->hidden;
    int32_t *words = back->hidden_words + n / PAIR * hidden, *next = pair ? words + hidden : NULL;
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t u = 0; u < hidden; u += 16) {
        __m512 sum[2] = {zero, zero};
        for (int64_t i = 0; i < 1 + pair; i++) {
            for (int64_t action = 0; action < shape->actions; action++) {
                const __m512 slope = _mm512_set1_ps(back->q_gradient[(n + i) * shape->actions + action]);
                sum[i] = _mm512_fmadd_ps(slope, _mm512_loadu_ps(pass->output + action * hidden + u), sum[i]);
            }
            /* Nothing passes where the unit was at rest; a unit that is not a number was not. */
            const __m512 h = _mm512_loadu_ps(pass->hidden + (n + i) * hidden + u);
            sum[i] = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(h, zero, _CMP_NLE_UQ), sum[i]);
            NAME(store)((Element *)back->hidden + (n + i) * hidden + u, sum[i]);
        }
        NAME(store_words)(words + u, next ? next + u : NULL, sum[0], sum[1]);
    }
}

/* Sums for `count` observations and 32 inputs over the units of the dense layer. */
ALWAYS_INLINE void NAME(dense_tile)(const int count, const int32_t *weight, int64_t step, const int32_t *hidden,
                                    int64_t words, float *out, int64_t out_step) {
    __m512 sum[8][2];
    UNROLL for (int n = 0; n < count; n++) sum[n][0] = sum[n][1] = _mm512_setzero_ps();
    for (int64_t w = 0; w < words; w++) {
        const __m512i b0 = held(weight + w * step), b1 = held(weight + w * step + 16);
        UNROLL for (int n = 0; n < count; n++) {
            const int32_t a = hidden[n * words + w];
            sum[n][0] = NAME(multiply_add)(sum[n][0], a, b0);
            sum[n][1] = NAME(multiply_add)(sum[n][1], a, b1);
        }
    }
    UNROLL for (int n = 0; n < count; n++) {
        _mm512_storeu_ps(out + n * out_step, sum[n][0]);
        _mm512_storeu_ps(out + n * out_step + 16, sum[n][1]);
    }
}

/* The gradient by 32 inputs of the dense layer, from `from` on, for all observations. The weights of those that probably
 * follow, one line of the cache in each row, are asked for. */
static void NAME(flat_gradient)(const Shape *shape, const Pass *pass, const Back *back, int64_t from, int64_t next,
                                uint8_t *scratch) {
    const int64_t words = shape->hidden / PAIR;
    const int32_t *weight, *hidden = (const int32_t *)back->hidden;
    int64_t step;
#if LOW
    const Element *rows = (const Element *)pass->dense + from;
    int32_t *tile = (int32_t *)scratch;
    const __m512i low = _mm512_loadu_si512(FIRST_OF_PAIRS), high = _mm512_loadu_si512(LAST_OF_PAIRS);
    for (int64_t w = 0; w < words; w++) {
        const __m512i a = _mm512_loadu_si512(rows + 2 * w * shape->flat);
        const __m512i b = _mm512_loadu_si512(rows + (2 * w + 1) * shape->flat);
        _mm512_storeu_si512(tile + 32 * w, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(tile + 32 * w + 16, _mm512_permutex2var_epi16(a, high, b));
    }
    weight = tile;
    step = 32;
#else
    (void)scratch;
    weight = (const int32_t *)pass->dense + from;
    step = shape->flat;
#endif
    int64_t n = 0, unit = next < shape->flat ? 0 : shape->hidden;
    const int64_t share = shape->hidden / (pass->batch / 8 + 1) + 1;
    float *out = back->flat + from;
    for (; n + 8 <= pass->batch; n += 8) {
        for (int64_t i = 0; i < share && unit < shape->hidden; i++, unit++)
            __builtin_prefetch((const Element *)pass->dense + unit * shape->flat + next, 0, 3);
        NAME(dense_tile)(8, weight, step, hidden + n * words, words, out + n * shape->flat, shape->flat);
    }
    for (; n < pass->batch; n++)
        NAME(dense_tile)(1, weight, step, hidden + n * words, words, out + n * shape->flat, shape->flat);
}

/* (units, pixels) as (pixels, units), zero where nothing was seen. */
static void NAME(by_pixels)(int64_t pixels, int64_t units, const Element *seen, const float *given, float *out) {
    for (int64_t u = 0; u < units; u += 16) {
        for (int64_t p = 0; p < pixels; p += 16) {
            const int64_t count = pixels - p < 16 ? pixels - p : 16;
            const __mmask16 there = (__mmask16)((1 << count) - 1);
            __m512 block[16];
            UNROLL for (int i = 0; i < 16; i++) {
                const int64_t at = (u + i) * pixels + p;
#if LOW
                const __mmask16 on = _mm256_mask_test_epi16_mask(there, _mm256_maskz_loadu_epi16(there, seen + at),
                                                                 _mm256_set1_epi16(-1));
#else
                const __mmask16 on =
                    _mm512_mask_cmp_ps_mask(there, _mm512_maskz_loadu_ps(there, seen + at), _mm512_setzero_ps(), _CMP_NEQ_UQ);
#endif
                block[i] = _mm512_maskz_loadu_ps(on, given + at);
            }
            turn(block);
            for (int64_t i = 0; i < count; i++) _mm512_storeu_ps(out + (p + i) * units + u, block[i]);
        }
    }
}

/* The gradients by the sums of every convolution, from the dense layer's inputs down, of observations n and n + 1. */
static void NAME(way_back)(const Shape *shape, const Pass *pass, const Back *back, int64_t n, uint8_t *scratch) {
    const int64_t pair = n + 1 < pass->batch, second = n + pair, group = n / PAIR;
    const __m512 zero = _mm512_setzero_ps();
    Element *in = (Element *)scratch, *in_second = in + shape->largest;
    float *sums = (float *)(in_second + shape->largest), *sums_second = sums + shape->largest;
    for (int64_t l = shape->convolutions - 1; l >= 0; l--) {
        const Convolution *conv = &shape->convolution[l];
        const int64_t pixels = conv->down * conv->across, units = conv->units, size = pixels * units;
        const int64_t border = l ? conv->kernel / conv->stride - 1 : 0, wide = conv->across + 2 * border;
        int32_t *words = back->words[l] + group * size, *next = pair ? words + size : NULL;
        if (l == shape->convolutions - 1) {
            const Element *flat = (const Element *)pass->flat + n * size, *flat_second = flat + pair * size;
            const float *given = back->flat + n * size, *given_second = given + pair * size;
            NAME(by_pixels)(pixels, units, flat, given, sums);
            NAME(by_pixels)(pixels, units, flat_second, given_second, sums_second);
        }
        if (border) {
            memset(in, 0, (conv->down + 2 * border) * wide * units * sizeof(Element));
            memset(in_second, 0, (conv->down + 2 * border) * wide * units * sizeof(Element));
        }
        for (int64_t p = 0; p < pixels; p++) {
            const int64_t at = ((p / conv->across + border) * wide + p % conv->across + border) * units;
            for (int64_t u = 0; u < units; u += 16) {
                const __m512 a = _mm512_loadu_ps(sums + p * units + u), b = _mm512_loadu_ps(sums_second + p * units + u);
                if (l) {
                    NAME(store)(in + at + u, a);
                    NAME(store)(in_second + at + u, b);
                }
                NAME(store_words)(words + p * units + u, next ? next + p * units + u : NULL, a, pair ? b : zero);
            }
        }
        if (!l) return;
        /* The input's gradient: for each place within a stride, a convolution of stride 1 with every stride-th weight. */
        const int64_t s = conv->stride, taps = conv->kernel / s, unit_words = units / PAIR, channels = conv->channels;
        const Window window = {.down = conv->height / s,
                               .across = conv->width / s,
                               .down_step = wide * unit_words,
                               .across_step = unit_words,
                               .lines = taps,
                               .pitch = wide * unit_words,
                               .length = taps * unit_words,
                               .border = border,
                               .inner = conv->down};
        const int32_t *seen = pass->seen[l] + group * conv->height * conv->width * channels;
        const int32_t *seen_second = seen + (LOW ? 0 : pair * conv->height * conv->width * channels);
        float *made = sums_second + shape->largest, *made_second = made + shape->largest;
        for (int64_t y = 0; y < s; y++) {
            for (int64_t x = 0; x < s; x++) {
                const int32_t *weight = back->weight[l] + (y * s + x) * taps * taps * unit_words * channels;
                NAME(convolve)(&window, (const int32_t *)in, (const int32_t *)in_second, weight, channels, made,
                               made_second);
                for (int64_t p = 0; p < window.down * window.across; p++) {
                    const int64_t to = ((p / window.across * s + y) * conv->width + p % window.across * s + x) * channels;
                    for (int64_t c = 0; c < channels; c += 16) {
                        const __m512i see = _mm512_loadu_si512(seen + to + c);
#if LOW
                        const __mmask16 on = _mm512_test_epi32_mask(see, _mm512_set1_epi32(0xffff));
                        const __mmask16 on_second = _mm512_test_epi32_mask(see, _mm512_set1_epi32((int32_t)0xffff0000));
                        (void)seen_second;
#else
                        const __m512i see_second = _mm512_loadu_si512(seen_second + to + c);
                        const __mmask16 on = _mm512_test_epi32_mask(see, see);
                        const __mmask16 on_second = _mm512_test_epi32_mask(see_second, see_second);
#endif
                        _mm512_storeu_ps(sums + to + c, _mm512_maskz_loadu_ps(on, made + p * channels + c));
                        _mm512_storeu_ps(sums_second + to + c,
                                         _mm512_maskz_loadu_ps(on_second, made_second + p * channels + c));
                    }
                }
            }
        }
    }
    (void)second;
}

/* Add to `rows` * `vectors` * 16 sums of products: of words x[i] (i < rows) and vectors of g, at `count` places a line.
 * With `lit` x is known at `count` places only and zero elsewhere; this is where they and their vectors begin. */
ALWAYS_INLINE void NAME(outer)(const int rows, const int vectors, float *sums, int64_t sums_step, int fresh,
                               const int32_t *x, int64_t lines, int64_t x_line, int64_t count, int64_t x_step,
                               const int32_t *g, int64_t g_step, const int32_t (*lit)[2]) {
    __m512 sum[8][4];
    UNROLL for (int i = 0; i < rows; i++) {
        UNROLL for (int v = 0; v < vectors; v++)
            sum[i][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + i * sums_step + 16 * v);
    }
    for (int64_t line = 0; line < lines; line++) {
        const int32_t *at = x + line * x_line;
        for (int64_t p = 0; p < count; p++) {
            const int32_t *of = lit ? g + lit[p][1] : g;
            if (lit) at = x + lit[p][0];
            __m512i b[4];
            UNROLL for (int v = 0; v < vectors; v++) b[v] = held(of + 16 * v);
            UNROLL for (int i = 0; i < rows; i++) {
                const int32_t a = at[i];
                UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = NAME(multiply_add)(sum[i][v], a, b[v]);
            }
            at += x_step;
            g += lit ? 0 : g_step;
        }
    }
    UNROLL for (int i = 0; i < rows; i++) {
        UNROLL for (int v = 0; v < vectors; v++) _mm512_storeu_ps(sums + i * sums_step + 16 * v, sum[i][v]);
    }
}

/* The gradient of a convolution's weights in one line of its kernel; the bias's too with the first. All places of the line
 * are visited while some lines of an observation are near: from further away they would not come as fast as they are used. */
static void NAME(kernel_gradient)(const Shape *shape, const Pass *pass, const Back *back, int64_t l, int64_t line) {
    const Convolution *conv = &shape->convolution[l];
    const int64_t groups = (pass->batch + PAIR - 1) / PAIR, units = conv->units, channels = conv->channels;
    const int64_t pixels = conv->down * conv->across, area = conv->height * conv->width * channels;
    const int64_t down = conv->stride * conv->width * channels, step = conv->stride * channels;
    const int64_t fit = NEAREST / 4 * 3 / 4 / (down + conv->across * units), near = fit > 1 ? fit : 1;
    /* What comes next is asked for in as many shares as there are turns below. */
    const int64_t rest = units % 64, blocks = units / 64 * 2 + rest / 32 + rest % 32 / 16;
    const int64_t turns = conv->kernel * blocks * channels / 8;
    const int64_t x_share = near * down / turns + 16, g_share = near * conv->across * units / turns + 16;
    int32_t lit[near * conv->across][2];
    for (int64_t from = 0; from < groups * conv->down;) {
        const int64_t y = from % conv->down, count = y + near < conv->down ? near : conv->down - y;
        const int32_t *g = back->words[l] + from * conv->across * units;
        const int32_t *at = pass->seen[l] + from / conv->down * area + y * down + line * conv->width * channels;
        const int32_t *x_next = at + count * down, *g_next = g + count * conv->across * units;
        const uint64_t *kept = l ? NULL : pass->lit + from / conv->down * conv->height + y + line;
        for (int64_t tap = 0; tap < conv->kernel; tap++, at += channels) {
            int64_t there;
            float *sums = back->gradient[l] + (line * conv->kernel + tap) * channels * units;
#define NEXT fetch(&x_next, x_share), fetch(&g_next, g_share)
#define REST units, from == 0, at + c, count, down, conv->across, step, g + u, units
            if (kept && (there = list_lit(conv, kept, count, tap, lit)) >= 0) {
#define LIT units, from == 0, at + c, 1, 0, there, 0, g + u, 0, (const int32_t(*)[2])lit
                int64_t u = 0;
                for (; u + 32 <= units; u += 32) {
                    for (int64_t c = 0; c < channels; c += 8)
                        NEXT, NAME(outer)(8, 2, sums + c * units + u, LIT);
                }
                for (; u < units; u += 16) {
                    for (int64_t c = 0; c < channels; c += 8)
                        NEXT, NAME(outer)(8, 1, sums + c * units + u, LIT);
                }
#undef LIT
                continue;
            }
            int64_t u = 0;
            for (; u + 64 <= units; u += 64) {
                for (int64_t c = 0; c < channels; c += 4) NEXT, NAME(outer)(4, 4, sums + c * units + u, REST, NULL);
            }
            for (; u + 32 <= units; u += 32) {
                for (int64_t c = 0; c < channels; c += 8) NEXT, NAME(outer)(8, 2, sums + c * units + u, REST, NULL);
            }
            for (; u < units; u += 16) {
                for (int64_t c = 0; c < channels; c += 8) NEXT, NAME(outer)(8, 1, sums + c * units + u, REST, NULL);
            }
#undef REST
#undef NEXT
        }
        from += count;
    }
    if (line == 0) {
        for (int64_t u = 0; u < units; u += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t i = 0; i < groups * pixels; i++)
                sum = NAME(multiply_add)(sum, ONE, _mm512_loadu_si512(back->words[l] + i * units + u));
            _mm512_storeu_ps(back->bias_gradient[l] + u, sum);
        }
    }
}

/* The gradient of 8 units of the dense layer, and at once their step, so that it never leaves the cache. */
static void NAME(dense_step)(const Shape *shape, const Pass *pass, const Back *back, const Layer *layer, int64_t from,
                             float *rows, const Adamax *adamax) {
    const int64_t groups = (pass->batch + PAIR - 1) / PAIR, flat = shape->flat, hidden = shape->hidden;
    const int32_t *seen = pass->seen[shape->convolutions];
    for (int64_t k = 0; k < flat;) {
        const int vectors = k + 48 <= flat ? 3 : 1;
        /* What the step will read comes near while the gradient is computed. */
        for (int64_t u = 0; u < 8; u++) {
            for (int64_t i = k; i < k + 16 * vectors; i += 16) {
                const int64_t at = (from + u) * flat + i;
                __builtin_prefetch(layer->v + at, 1, 2);
                __builtin_prefetch(layer->v_mean + at, 1, 2);
                __builtin_prefetch(layer->v_max + at, 1, 2);
            }
        }
        const int32_t *x = back->hidden_words + from;
        if (vectors == 3)
            NAME(outer)(8, 3, rows + k, flat, 1, x, 1, 0, groups, hidden, seen + k, flat, NULL);
        else
            NAME(outer)(8, 1, rows + k, flat, 1, x, 1, 0, groups, hidden, seen + k, flat, NULL);
        k += 16 * vectors;
    }
    for (int64_t u = 0; u < 8; u++) {
        float sum = 0.0f;
        for (int64_t n = 0; n < pass->batch; n++) {
            const Element value = ((const Element *)back->hidden)[n * hidden + from + u];
#if LOW
            sum += widened(value);
#else
            sum += value;
#endif
        }
        ((float *)layer->bias_gradient)[from + u] = sum;
        step_unit(layer, from + u, rows + u * flat, adamax);
    }
}

/* A thread's share of the gradients by the convolutions' sums, then their weights, and of the dense layer's steps. */
static void NAME(work)(const Shape *shape, const Pass *pass, const Back *back, const Layer *dense, Queue *queue,
                       uint8_t *scratch, const Adamax *adamax) {
    const int64_t backs = (pass->batch + 1) / 2, steps = shape->hidden / 8;
    int64_t kernels = 0, one;
    for (int64_t l = 0; l < shape->convolutions; l++)
        kernels += shape->convolution[l].kernel;
    while (THREAD % 2 && (one = TAKE(next_dense)) < steps)
        NAME(dense_step)(shape, pass, back, dense, one * 8, (float *)scratch, adamax);
    for (;;) {
        if (LEFT(next_back, backs)) {
            if ((one = TAKE(next_back)) >= backs) continue;
            NAME(way_back)(shape, pass, back, one * 2, scratch);
            __atomic_fetch_add(&queue->done_back, 1, __ATOMIC_RELEASE);
        } else if (!LEFT(done_back, backs) && LEFT(next_kernel, kernels)) {
            if ((one = TAKE(next_kernel)) >= kernels) continue;
            int64_t l = 0;
            for (int64_t lines; one >= (lines = shape->convolution[l].kernel); l++) one -= lines;
            NAME(kernel_gradient)(shape, pass, back, l, one);
        } else if (LEFT(next_dense, steps)) {
            if ((one = TAKE(next_dense)) < steps)
                NAME(dense_step)(shape, pass, back, dense, one * 8, (float *)scratch, adamax);
        } else if (!LEFT(next_kernel, kernels)) {
            return;
        } else {
            _mm_pause(); /* another thread has the last of what kernels need */
        }
    }
}

#if LOW
/* What `rounded` makes of 16 values, each in the lower half of a word. */
static inline __m512i low_words(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values), one = _mm512_set1_epi32(1);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    const __m512i even = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), last));
    const __mmask16 none = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_srli_epi32(even, 16), none, _mm512_set1_epi32(0x7fc0));
}
#endif

/* The step of a convolution's units [from, from + 16). Gradient and working weights have units next to each other, what
 * is trained has inputs: 16 by 16 are turned at a time, so that everything is read and written in whole vectors. */
static void NAME(step_units)(const Layer *layer, int64_t from, uint8_t *scratch, const Adamax *adamax) {
    const int64_t inputs = layer->inputs, units = layer->units;
    float *rows = (float *)scratch, *turned = rows + 16 * inputs; /* (16, inputs) and (inputs, 16) */
    int32_t *input_of = (int32_t *)(turned + 16 * inputs);        /* in the order of gradient and working weight */
    const float *gradient = (const float *)layer->gradient + from;
    __m512 block[16];
    for (int64_t i = 0; i < inputs; i += 16) {
        UNROLL for (int k = 0; k < 16; k++) block[k] = _mm512_loadu_ps(gradient + layer->gradient_place[i + k]);
        turn(block);
        UNROLL for (int u = 0; u < 16; u++) _mm512_storeu_ps(rows + u * inputs + i, block[u]);
    }
    float scales[16];
    for (int64_t u = 0; u < 16; u++) {
        step_trained(layer, from + u, rows + u * inputs, adamax);
        scales[u] = scale_of(layer, from + u);
    }
    for (int64_t i = 0; i < inputs; i += 16) {
        UNROLL for (int u = 0; u < 16; u++) {
            const __m512 v = _mm512_loadu_ps(layer->v + (from + u) * inputs + i);
            block[u] = _mm512_mul_ps(v, _mm512_set1_ps(scales[u]));
        }
        turn(block);
        for (int k = 0; k < 16; k++) {
            const int64_t at = layer->gradient_place[i + k] / units;
            input_of[at] = (int32_t)(i + k);
            _mm512_storeu_ps(turned + 16 * at, block[k]);
        }
    }
    for (int64_t at = 0; at < inputs; at += PAIR) {
        int32_t *work = (int32_t *)layer->work + at / PAIR * units + from;
#if LOW
        const __m512i low[2] = {low_words(_mm512_loadu_ps(turned + 16 * at)),
                                low_words(_mm512_loadu_ps(turned + 16 * at + 16))};
        _mm512_storeu_si512(work, _mm512_or_si512(low[0], _mm512_slli_epi32(low[1], 16)));
        for (int i = 0; layer->back && i < 2; i++) {
            uint16_t *back = (uint16_t *)layer->back + layer->back_place[input_of[at + i]];
            int32_t pairs[8];
            _mm256_storeu_si256((__m256i *)pairs, _mm512_cvtepi32_epi16(low[i]));
            for (int64_t u = 0; u < 8; u++) memcpy(back + (from / 2 + u) * layer->back_unit_step, pairs + u, 4);
        }
#else
        memcpy(work, turned + 16 * at, 64);
        if (!layer->back) continue;
        float *back = (float *)layer->back + layer->back_place[input_of[at]];
        for (int64_t u = 0; u < 16; u++) back[(from + u) * layer->back_unit_step] = turned[16 * at + u];
#endif
    }
}

/* From the gradient by the Q-values to the next weights. */
void NAME(backward_and_step)(const Shape *shape, const Pass *pass, const Back *back, const Layer *layers,
                             uint8_t *scratch, int64_t threads, float rate, float beta1, float beta2, float eps) {
    const Adamax adamax = {rate, beta1, beta2, eps};
    const Layer *dense = &layers[shape->convolutions], *output = dense + 1;
    Queue queue = {0, 0, 0, 0};
#pragma omp parallel num_threads(threads)
    {
        uint8_t *mine = scratch + THREAD * shape->scratch;
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t action = 0; action < shape->actions; action++) {
            float *row = (float *)output->gradient + action * shape->hidden, bias = 0.0f;
            memset(row, 0, shape->hidden * sizeof(float));
            for (int64_t n = 0; n < pass->batch; n++) {
                const float slope = back->q_gradient[n * shape->actions + action];
                const float *h = pass->hidden + n * shape->hidden;
                for (int64_t u = 0; u < shape->hidden; u++) row[u] += slope * h[u];
                bias += slope;
            }
            ((float *)output->bias_gradient)[action] = bias;
        }
#pragma omp for schedule(static)
        for (int64_t n = 0; n < pass->batch; n += 2) NAME(hidden_gradient)(shape, pass, back, n);
#pragma omp for schedule(dynamic, 1)
        for (int64_t k = 0; k < shape->flat; k += 32) NAME(flat_gradient)(shape, pass, back, k, k + 32 * threads, mine);
        NAME(work)(shape, pass, back, dense, &queue, mine, &adamax);
#pragma omp barrier
        for (int64_t l = 0; l < shape->convolutions; l++) {
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t unit = 0; unit < layers[l].units; unit += 16)
                NAME(step_units)(&layers[l], unit, mine, &adamax);
        }
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t unit = 0; unit < output->units; unit++) step_gathered(output, unit, (float *)mine, &adamax);
    }
}

/* A whole update: `passes` are the target network's and the network's own. Returns the loss, and if it is checked and not
 * finite has changed nothing. Without a store the transitions are in the objective already. */
static float NAME(learn_once)(const Shape *shape, const Pass *passes, const Store *store, const int64_t *numbers,
                              const Objective *objective, const Back *back, const Layer *layers, uint8_t *scratch,
                              int64_t threads, float rate, float beta1, float beta2, float eps) {
    const double start = seconds();
    if (store) look_up(store, numbers, passes[1].batch, objective);
    const double found = seconds();
    NAME(forward)(shape, passes, 2, scratch, threads);
    const float loss = lose(objective, passes[1].batch, shape->actions, passes[1].q_values, passes[0].q_values);
    const double halfway = seconds();
    if (objective->unchecked || isfinite(loss))
        NAME(backward_and_step)(shape, &passes[1], back, layers, scratch, threads, rate, beta1, beta2, eps);
    objective->seconds[0] += found - start;
    objective->seconds[1] += halfway - found;
    objective->seconds[2] += seconds() - halfway;
    return loss;
}

/* `count` updates with a rate each, on the transitions of one row of `numbers` after the other, until one is refused;
 * returns how many were made, and in `loss` the last loss; -1 and nothing is made where there is no such transition or
 * action. What the dense layer sees goes to the pass's place and to `spare` in turns, so after a refused update that of
 * the one before is still there. */
int64_t NAME(learn)(const Shape *shape, const Pass *passes, const Store *store, const int64_t *numbers, int64_t count,
                    const Objective *objective, const Back *back, const Layer *layers, uint8_t *scratch, int64_t threads,
                    const float *rates, float beta1, float beta2, float eps, void *spare, float *loss) {
    Pass both[2] = {passes[0], passes[1]}, *own = &both[1];
    int32_t **seen = &own->seen[shape->convolutions];
    const int same = (void *)*seen == own->flat;
    if (!exist(store, numbers, count * own->batch, objective, shape->actions)) return -1;
    for (int64_t made = 0; made < count; made++) {
        *loss = NAME(learn_once)(shape, both, store, store ? numbers + made * own->batch : NULL, objective, back, layers,
                                 scratch, threads, rates[made], beta1, beta2, eps);
        if (!objective->unchecked && !isfinite(*loss)) return made;
        void *next = own->flat == passes[1].flat ? spare : passes[1].flat;
        own->flat = next;
        if (same) *seen = next;
    }
    return count;
}
