// Noise by its address (seed, stream, example), the same as vae_export/numerics/noise.py computes on the host.
//
// Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, figure 2 and table 2):
// key (seed, stream); the counter's low 128 bits are example * blocks + block, its third word is the draw, its
// fourth 0. Each 64-bit word gives two 32-bit halves, low half first. A thread makes one block: eight numbers.
// Compiled at run time by NVRTC; plain enough for a C++ compiler to run it on the host, where it is tested.

typedef unsigned int u32;
typedef unsigned long long u64;

struct Block {
    u64 word[4];
};

__device__ __forceinline__ Block philox(u64 low, u64 high, u64 draw, u64 seed, u64 stream) {
    u64 a = low, b = high, c = draw, d = 0;
    for (int round = 0; round < 10; ++round) {
        const u64 first = 0xD2E7470EE14C6C93ULL, second = 0xCA5A826395121157ULL;
        u64 next = __umul64hi(second, c) ^ b ^ seed;
        u64 last = __umul64hi(first, a) ^ d ^ stream;
        b = second * c;
        d = first * a;
        a = next;
        c = last;
        seed += 0x9E3779B97F4A7C15ULL;
        stream += 0xBB67AE8584CAA73BULL;
    }
    return {{a, b, c, d}};
}

// Block `block` of example `example`.
__device__ __forceinline__ Block words_of(u64 example, u64 block, u64 blocks, u64 draw, u64 seed, u64 stream) {
    u64 low = example * blocks;
    u64 high = __umul64hi(example, blocks);
    u64 sum = low + block;
    return philox(sum, high + (sum < low), draw, seed, stream);
}

__device__ __forceinline__ u32 half_of(const Block &block, int index) {
    return (u32)(block.word[index >> 1] >> (32 * (index & 1)));
}

// Two standard normals by the Box-Muller transform, through float64, rounded once.
__device__ __forceinline__ void normal_pair(u32 first, u32 second, float *cosine, float *sine) {
    double radius = sqrt(log(((double)first + 0.5) * 0x1p-32) * -2.0);
    double angle = ((double)second + 0.5) * 0x1p-32 * 6.283185307179586;
    double s, c;
    sincos(angle, &s, &c);
    *cosine = (float)(radius * c);
    *sine = (float)(radius * s);
}

__device__ __forceinline__ u64 thread_index() {
    return (u64)blockIdx.x * blockDim.x + threadIdx.x;
}

// out (count, size): the raw 32-bit words.
extern "C" __global__ void vae_words(u32 *out, u64 count, u64 size, u64 first, u64 seed, u64 stream, u64 draw) {
    u64 blocks = (size + 7) / 8, thread = thread_index();
    if (thread >= count * blocks) return;
    u64 row = thread / blocks, block = thread % blocks;
    Block words = words_of(first + row, block, blocks, draw, seed, stream);
    for (int i = 0; i < 8 && block * 8 + i < size; ++i) out[row * size + block * 8 + i] = half_of(words, i);
}

// out (count, size): standard normals.
extern "C" __global__ void vae_normals(float *out, u64 count, u64 size, u64 first, u64 seed, u64 stream, u64 draw) {
    u64 blocks = (size + 7) / 8, thread = thread_index();
    if (thread >= count * blocks) return;
    u64 row = thread / blocks, block = thread % blocks;
    Block words = words_of(first + row, block, blocks, draw, seed, stream);
    for (int i = 0; i < 8; i += 2) {
        u64 column = block * 8 + i;
        if (column >= size) return;
        float cosine, sine;
        normal_pair(half_of(words, i), half_of(words, i + 1), &cosine, &sine);
        out[row * size + column] = cosine;
        if (column + 1 < size) out[row * size + column + 1] = sine;
    }
}

// z (n): mean + exp(logvar / 2) * eps, each step rounded once to float32. z may be eps.
extern "C" __global__ void vae_reparameterize(float *z, const float *mean, const float *logvar, const float *eps,
                                              u64 n) {
    u64 i = thread_index();
    if (i >= n) return;
    float std = (float)exp((double)(0.5f * logvar[i]));
    z[i] = __fadd_rn(mean[i], __fmul_rn(std, eps[i]));
}
