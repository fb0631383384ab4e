// Few new rows of documents, on a CPU: the whole decoder in one call, all threads from its first layer to its last. A
// step reads every weight once and computes little with it; torch's products of few rows, and some ten calls a layer,
// do not get near the memory's rate. decode.py compiles this for the machine it runs on; decoder.py says what it
// computes. Arithmetic is in fp32, whatever weights and cache are stored as. A row's bits do not depend on the others.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
constexpr int LANES = 16, MOST_ROWS = 8;  // of x at once: 2 · 8 sums and a row of x fit 32 registers
#else
constexpr int LANES = 8, MOST_ROWS = 4;
#endif
template <class T> using Lanes [[gnu::vector_size(LANES * sizeof(T))]] = T;
using Vec = Lanes<float>;
struct bf16 { uint16_t bits; };

extern "C" {
struct Matrix {  // [N, K], rows one after the other
    const void *data;
    const float *scale;  // of each row, if it is stored as int8
    int64_t kind;        // 0 float, 1 bf16, 2 int8
};

struct Layer {
    const float *norm1, *q_norm, *k_norm, *norm2;  // q_norm and k_norm may be null
    Matrix qkv, out, router, gate, up, down;
    int64_t experts;  // 1 of a dense layer, which has no router
    int64_t gate_stride;  // rows from an expert's gate to the next one's, and of up
    void *k, *v;  // [pages, page, G, Dh], stored as `cache` says
};

struct Model {
    int64_t width, heads, groups, head, ffn, chosen, layers, vocabulary, page, cache;
    float eps;
    const float *frequencies;  // [Dh/2]
    const float *norm;
    Matrix embedding, lm_head;
    const Layer *layer;
};
}

template <class T> static Lanes<T> raw(const T *p) {
    Lanes<T> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
static Vec load(const float *p) { return raw(p); }
static Vec load(const int8_t *p) {  // by doubles: compilers know no step from 8 to 32 bits
    auto wider = __builtin_convertvector(raw(p), Lanes<int16_t>);
    return __builtin_convertvector(__builtin_convertvector(wider, Lanes<int32_t>), Vec);
}
static Vec load(const bf16 *p) {
    return (Vec)(__builtin_convertvector(raw(&p->bits), Lanes<uint32_t>) << 16);
}
static float one(float x) { return x; }
static float one(int8_t x) { return x; }
static float one(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
static void put(float *p, float x) { *p = x; }
static void put(bf16 *p, float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    p->bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static void save(float *p, Vec x) { std::memcpy(p, &x, sizeof x); }
static Vec all(float x) { return x - Vec{}; }
template <int N> static float sum(const float *x) {  // by halves, which are vectors as well
    typedef float Half __attribute__((vector_size(N * 2)));
    Half a, b;
    std::memcpy(&a, x, sizeof a);
    std::memcpy(&b, x + N / 2, sizeof b);
    a += b;
    return sum<N / 2>((const float *)&a);
}
template <> float sum<1>(const float *x) { return *x; }
static float sum(Vec x) { return sum<LANES>((const float *)&x); }

// e^x to 2 ulp (Cephes' polynomial); below -87 as of -87.
static Vec exp(Vec x) {
    x = x > all(88) ? all(88) : x < all(-87) ? all(-87) : x;
    Vec n = (x * 1.44269504f + 12582912.f) - 12582912.f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vec p = ((((r * 1.9875691500e-4f + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r +
             1.6666665459e-1f) * r + 5.0000001201e-1f;
    return (p * r * r + r + 1) * (Vec)((__builtin_convertvector(n, Lanes<int32_t>) + 127) << 23);
}

// out[m][n] = w[n] · x[m]; ahead: numbers to the row that is wanted soon
template <int N, int M, class W>
static void tile(const W *w, int64_t stride, const float *const *x, int64_t K, float (*out)[N], int64_t ahead = 0) {
    Vec acc[N][M] = {};
    int64_t k = 0;
    for (; k + LANES <= K; k += LANES)
        for (int n = 0; n < N; n++) {
            Vec a = load(w + n * stride + k);
            __builtin_prefetch(w + n * stride + k + ahead);
            for (int m = 0; m < M; m++) acc[n][m] += a * load(x[m] + k);
        }
    for (int n = 0; n < N; n++)
        for (int m = 0; m < M; m++) {
            float y = sum(acc[n][m]);
            for (int64_t i = k; i < K; i++) y += one(w[n * stride + i]) * x[m][i];
            out[m][n] = y;
        }
}

template <int N, int M, class W, class Emit>
static void some(const W *w, int64_t stride, const float *const *x, int64_t K, int m, int n, int64_t ahead,
                 Emit &&emit) {
    float out[M][N];
    tile<N, M>(w, stride, x + m, K, out, ahead);
    for (int i = 0; i < M; i++)
        for (int j = 0; j < N; j++) emit(m + i, n + j, out[i][j]);
}

// emit(m, n, w[n] · x[m]) for n < N: few rows of x, which stay in the first cache, meet all of w in turn.
template <class W, class Emit>
static void rows(const W *w, int64_t stride, int N, const float *const *x, int M, int64_t K, Emit &&emit) {
    int m = 0, whole = N / 4 * 4;
    int64_t ahead = std::max<int64_t>(1, 1024 / stride) * stride;  // 4 kB: without, memory waits for the products
    for (; m + MOST_ROWS <= M; m += MOST_ROWS)
        for (int n = 0; n < whole; n += 2) some<2, MOST_ROWS>(w + n * stride, stride, x, K, m, n, ahead, emit);
    for (; m + 2 <= M; m += 2)
        for (int n = 0; n < whole; n += 4) some<4, 2>(w + n * stride, stride, x, K, m, n, ahead, emit);
    for (; m < M; m++)
        for (int n = 0; n < whole; n += 4) some<4, 1>(w + n * stride, stride, x, K, m, n, ahead, emit);
    for (int n = whole; n < N; n++)
        for (m = 0; m < M; m++) some<1, 1>(w + n * stride, stride, x, K, m, n, ahead, emit);
}

// Rows first … first + N - 1 of w.
template <class Emit>
static void product(const Matrix &w, int64_t first, int N, const float *const *x, int M, int64_t K, Emit &&emit) {
    if (w.kind == 0) rows((const float *)w.data + first * K, K, N, x, M, K, emit);
    if (w.kind == 1) rows((const bf16 *)w.data + first * K, K, N, x, M, K, emit);
    if (w.kind == 2)
        rows((const int8_t *)w.data + first * K, K, N, x, M, K,
             [&](int m, int n, float y) { emit(m, n, y * w.scale[first + n]); });
}

static void norm(const float *x, const float *weight, int64_t n, float eps, float *y) {
    float total[1][1];
    tile<1, 1>(x, 0, &x, n, total);
    float scale = 1 / std::sqrt(total[0][0] / n + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
}

// Softmax in place without its division, over n; returns the sum.
static float exponentials(float *s, int64_t n) {
    float top = *std::max_element(s, s + n), total = 0;
    int64_t i = 0;
    Vec sums = {};
    for (; i + LANES <= n; i += LANES) {
        Vec e = exp(load(s + i) - top);
        sums += e;
        save(s + i, e);
    }
    for (; i < n; i++) total += s[i] = std::exp(s[i] - top);
    return total + sum(sums);
}

// Of one group the first of a page's rows, which are c.groups · c.head apart.
template <class T> static T *page_of(const Model &c, void *cache, int32_t page, int64_t g) {
    return (T *)cache + (page * c.page * c.groups + g) * c.head;
}

// Of one row and group, fp32 [R + 2, Dh]: turns queries and key, and keeps key and value.
template <class T>
static void keep(const Model &c, const Layer &l, float *qkv, int64_t g, int64_t position, const int32_t *pages,
                 const float *cosines, const float *sines) {
    int64_t R = c.heads / c.groups, D = c.head, half = D / 2;
    for (int64_t r = 0; r <= R; r++) {
        float *x = qkv + r * D;
        if (const float *weight = r < R ? l.q_norm : l.k_norm) norm(x, weight, D, c.eps, x);
        for (int64_t i = 0; i < half; i++) {
            float a = x[i], b = x[i + half];
            x[i] = a * cosines[i] - b * sines[i];
            x[i + half] = b * cosines[i] + a * sines[i];
        }
    }
    int64_t row = position % c.page * c.groups * D;
    T *k = page_of<T>(c, l.k, pages[position / c.page], g) + row;
    T *v = page_of<T>(c, l.v, pages[position / c.page], g) + row;
    for (int64_t i = 0; i < D; i++) put(k + i, qkv[R * D + i]), put(v + i, qkv[(R + 1) * D + i]);
}

// y[i…] += Σ_j s[j] · v[j][i…] over N vectors of rows j, `stride` apart
template <int N, class T>
static void weighted(const T *v, int64_t stride, int64_t rows, const float *s, float *y) {
    Vec acc[N];
    for (int i = 0; i < N; i++) acc[i] = load(y + i * LANES);
    for (int64_t j = 0; j < rows; j++)
        for (int i = 0; i < N; i++) {
            acc[i] += load(v + j * stride + i * LANES) * s[j];
            __builtin_prefetch(v + (j + rows) * stride + i * LANES);
        }
    for (int i = 0; i < N; i++) save(y + i * LANES, acc[i]);
}

// y [H, Dh] of a row's queries, over its document up to itself, of groups `first` to `end`: page by page, as they lie.
template <class T>
static void attend(const Model &c, const Layer &l, const float *qkv, int64_t first, int64_t end, int64_t position,
                   const int32_t *pages, const float **heads, float *scores, float *y) {
    int64_t R = c.heads / c.groups, D = c.head, length = position + 1, stride = c.groups * D;
    float scale = 1 / std::sqrt(float(D));
    for (int64_t h = first * R; h < end * R; h++) heads[h] = qkv + (h / R * (R + 2) + h % R) * D;
    for (int64_t j = 0; j < length; j += c.page)
        for (int64_t g = first; g < end; g++)
            rows(page_of<T>(c, l.k, pages[j / c.page], g), stride, int(std::min(c.page, length - j)), heads + g * R,
                 int(R), D, [&](int r, int n, float s) { scores[(g * R + r) * length + j + n] = s * scale; });
    std::fill(y + first * R * D, y + end * R * D, 0.f);
    for (int64_t h = first * R; h < end * R; h++) {
        float total = exponentials(scores + h * length, length);
        for (int64_t j = 0; j < length; j++) scores[h * length + j] /= total;
    }
    for (int64_t j = 0; j < length; j += c.page)
        for (int64_t h = first * R; h < end * R; h++) {
            const T *v = page_of<T>(c, l.v, pages[j / c.page], h / R);
            const float *s = scores + h * length + j;
            int64_t n = std::min(c.page, length - j), i = 0;
            for (; i + 4 * LANES <= D; i += 4 * LANES) weighted<4>(v + i, stride, n, s, y + h * D + i);
            for (; i + LANES <= D; i += LANES) weighted<1>(v + i, stride, n, s, y + h * D + i);
            for (; i < D; i++)
                for (int64_t m = 0; m < n; m++) y[h * D + i] += one(v[m * stride + i]) * s[m];
        }
}

// Experts of a token by its logits: the highest, of equal ones the first; softmax over the chosen.
static void choose(const float *logits, int64_t E, int64_t K, int32_t *index, float *weight) {
    float total = 0;
    for (int64_t k = 0; k < K; k++) {
        int64_t best = -1;
        for (int64_t e = 0; e < E; e++)
            if (std::find(index, index + k, e) == index + k && (best < 0 || logits[e] > logits[best])) best = e;
        index[k] = int32_t(best);
        total += weight[k] = std::exp(logits[best] - logits[index[0]]);
    }
    for (int64_t k = 0; k < K; k++) weight[k] /= total;
}

// B rows by their tokens, or embedded already fp32 [B, D]; positions [B]; pages: of each row's document. Of `count`
// rows `wanted` logits fp32 [count, V], and of each the best and its log-probability.
extern "C" void decode(const Model *model, int64_t B, const int64_t *tokens, const float *embedded,
                       const int64_t *positions, const int32_t *const *pages, int64_t count, const int64_t *wanted,
                       float *logits, int64_t *best, float *logprobs, int threads) {
    const Model &c = *model;
    const int64_t D = c.width, H = c.heads * c.head, K = c.chosen, half = c.head / 2, R = c.heads / c.groups;
    const int64_t QKV = (R + 2) * c.head * c.groups, longest = 1 + *std::max_element(positions, positions + B);
    const int64_t block = B > MOST_ROWS ? 32 : 4;  // rows of a weight at once; to many rows of x they come from a cache
    const int64_t together = B < threads ? 1 : c.groups;  // of a row by one thread: their keys lie side by side
    int64_t most = 1;
    for (int64_t i = 0; i < c.layers; i++) most = std::max(most, c.layer[i].experts);
    std::vector<float> x(B * D), y(B * D), qkv(B * QKV), attended(B * H), hidden(B * K * c.ffn), cosines(B * half),
        sines(B * half), router(B * most), weight(B * K);
    std::vector<int32_t> index(B * K);
    struct Slot { int64_t token, place; };  // place: of its hidden row
    std::vector<std::vector<Slot>> slots(most);
    std::vector<int64_t> active;
    std::vector<const float *> normed(B), rows_attended(B), last(count);
    for (int64_t b = 0; b < B; b++) normed[b] = &y[b * D], rows_attended[b] = &attended[b * H];
    for (int64_t i = 0; i < count; i++) last[i] = normed[wanted[i]];

    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(c.heads * longest);
        std::vector<const float *> inputs(std::max(B * K, c.heads));
        #pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            for (int64_t i = 0; i < half; i++) {
                float angle = float(positions[b]) * c.frequencies[i];
                cosines[b * half + i] = std::cos(angle), sines[b * half + i] = std::sin(angle);
            }
            for (int64_t i = 0; i < D; i++)
                x[b * D + i] = embedded           ? embedded[b * D + i]
                               : c.embedding.kind ? one(((const bf16 *)c.embedding.data)[tokens[b] * D + i])
                                                  : ((const float *)c.embedding.data)[tokens[b] * D + i];
        }
        // emit(m, n, value) of all rows n of w, shared among the threads
        auto linear = [&](const Matrix &w, int64_t N, const std::vector<const float *> &in, int64_t width, auto emit) {
            #pragma omp for schedule(static)
            for (int64_t n = 0; n < N; n += block)
                product(w, n, int(std::min(block, N - n)), in.data(), int(in.size()), width,
                        [&](int m, int i, float v) { emit(m, n + i, v); });
        };
        auto normalize = [&](const float *by) {
            #pragma omp for schedule(static)
            for (int64_t b = 0; b < B; b++) norm(&x[b * D], by, D, c.eps, &y[b * D]);
        };
        for (int64_t i = 0; i < c.layers; i++) {
            const Layer &l = c.layer[i];
            normalize(l.norm1);
            linear(l.qkv, QKV, normed, D, [&](int m, int64_t n, float v) { qkv[m * QKV + n] = v; });
            auto group = [&](int64_t b, int64_t g) { return &qkv[b * QKV + g * (R + 2) * c.head]; };
            #pragma omp for schedule(static)
            for (int64_t task = 0; task < B * c.groups; task++) {
                int64_t b = task / c.groups, g = task % c.groups;
                (c.cache ? keep<bf16> : keep<float>)(c, l, group(b, g), g, positions[b], pages[b], &cosines[b * half],
                                                     &sines[b * half]);
            }
            #pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < B * c.groups; task += together) {
                int64_t b = task / c.groups, g = task % c.groups;
                (c.cache ? attend<bf16> : attend<float>)(c, l, &qkv[b * QKV], g, g + together, positions[b], pages[b],
                                                         inputs.data(), scores.data(), &attended[b * H]);
            }
            linear(l.out, D, rows_attended, H, [&](int m, int64_t n, float v) { x[m * D + n] += v; });
            normalize(l.norm2);
            const int64_t E = l.experts, chosen = E > 1 ? K : 1;
            if (E > 1) linear(l.router, E, normed, D, [&](int m, int64_t n, float v) { router[m * E + n] = v; });
            #pragma omp single
            {
                active.clear();
                for (int64_t b = 0; b < B; b++) {
                    index[b * chosen] = 0, weight[b * chosen] = 1;
                    if (E > 1) choose(&router[b * E], E, K, &index[b * K], &weight[b * K]);
                }
                for (auto &slot : slots) slot.clear();
                for (int64_t s = 0; s < B * chosen; s++) {
                    if (slots[index[s]].empty()) active.push_back(index[s]);
                    slots[index[s]].push_back({s / chosen, s});
                }
                std::sort(active.begin(), active.end());  // sums in one order, whoever else is there
            }
            const int64_t F = c.ffn, blocks = (F + block - 1) / block;
            #pragma omp for schedule(static)
            for (int64_t task = 0; task < int64_t(active.size()) * blocks; task++) {
                int64_t e = active[task / blocks], f = task % blocks * block;
                int N = int(std::min(block, F - f)), M = int(slots[e].size());
                for (int m = 0; m < M; m++) inputs[m] = normed[slots[e][m].token];
                auto row = [&](int m) { return &hidden[slots[e][m].place * F + f]; };
                product(l.gate, e * l.gate_stride + f, N, inputs.data(), M, D,
                        [&](int m, int n, float v) { row(m)[n] = v / (1 + std::exp(-v)); });
                product(l.up, e * l.gate_stride + f, N, inputs.data(), M, D,
                        [&](int m, int n, float v) { row(m)[n] *= v; });
            }
            #pragma omp for schedule(static)
            for (int64_t n = 0; n < D; n += block)
                for (int64_t e : active) {
                    int M = int(slots[e].size());
                    for (int m = 0; m < M; m++) inputs[m] = &hidden[slots[e][m].place * F];
                    product(l.down, e * D + n, int(std::min(block, D - n)), inputs.data(), M, F,
                            [&](int m, int j, float v) {
                                const Slot &slot = slots[e][m];
                                x[slot.token * D + n + j] += v * weight[slot.place];
                            });
                }
        }
        normalize(c.norm);
        linear(c.lm_head, c.vocabulary, last, D, [&](int m, int64_t n, float v) { logits[m * c.vocabulary + n] = v; });
        #pragma omp for schedule(static)
        for (int64_t b = 0; b < count; b++) {
            const float *row = logits + b * c.vocabulary, *top = std::max_element(row, row + c.vocabulary);
            Vec sums = {};
            int64_t i = 0;
            for (; i + LANES <= c.vocabulary; i += LANES) sums += exp(load(row + i) - *top);
            float total = sum(sums);
            for (; i < c.vocabulary; i++) total += std::exp(row[i] - *top);
            best[b] = top - row, logprobs[b] = -std::log(total);
        }
    }
}
