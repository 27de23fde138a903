/* AVX2 with FMA. vpmaddubsw multiplies 32 unsigned weight codes by 32 signed activation codes and adds
 * pairs of products in 16 bits; how often such sums can be added there depends on the code widths. */
#include "rows.h"
#include "vectors_avx2.h"

namespace treeq {
namespace {

__m256i load_codes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

/* 32 codes of a chunk: bytes 32 half .. 32 half + 31 of vector j. */
template <int kBits>
TREEQ_INLINE __m256i unpack_half(const uint8_t* chunk, int j, int half) {
  constexpr Parts parts = parts_of(kBits);
  constexpr int kHalf = kVector / 2;
  if (kBits == 8) return load_codes(chunk + j * kVector + half * kHalf);
  __m256i codes = _mm256_setzero_si256();
  int shift = 0;
  if (parts.nibbles) {
    const __m256i bytes = load_codes(chunk + j % 2 * kVector + half * kHalf);
    codes = _mm256_and_si256(j < 2 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15));
    chunk += kChunkCodes / 2;
    shift = 4;
  }
  if (parts.pairs) {
    const __m256i bytes = load_codes(chunk + half * kHalf);
    const int right = 2 * j - shift;
    const __m256i moved = right >= 0 ? _mm256_srli_epi16(bytes, right > 0 ? right : 0)
                                     : _mm256_slli_epi16(bytes, right < 0 ? -right : 0);
    codes = _mm256_or_si256(codes, _mm256_and_si256(moved, _mm256_set1_epi8(char(3 << shift))));
    chunk += kVector;
    shift += 2;
  }
  if (parts.singles) {
    int32_t bits;
    __builtin_memcpy(&bits, chunk + 8 * j + 4 * half, sizeof bits);
    const __m256i copies = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202,
                                              0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x(int64_t(0x8040201008040201));
    const __m256i eight = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), copies);
    const __m256i present = _mm256_cmpeq_epi8(_mm256_and_si256(eight, bit), bit);
    codes = _mm256_or_si256(codes,
                            _mm256_and_si256(present, _mm256_set1_epi8(char(1 << shift))));
  }
  return codes;
}

template <int kBits>
void unpack_chunks(const uint8_t* stream, int64_t chunks, uint8_t* codes) {
  for (int64_t c = 0; c < chunks; ++c, stream += chunk_bytes(kBits), codes += kChunkCodes) {
    TREEQ_UNROLL
    for (int half = 0; half < 2; ++half) {
      TREEQ_UNROLL
      for (int j = 0; j < kVectors; ++j)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + j * kVector + half * kVector / 2),
                            unpack_half<kBits>(stream, j, half));
    }
  }
}

void unpack_tile(const uint8_t* stream, int bits, int64_t chunks, uint8_t* codes) {
  switch (bits) {
    case 2: return unpack_chunks<2>(stream, chunks, codes);
    case 3: return unpack_chunks<3>(stream, chunks, codes);
    case 4: return unpack_chunks<4>(stream, chunks, codes);
    case 5: return unpack_chunks<5>(stream, chunks, codes);
    case 6: return unpack_chunks<6>(stream, chunks, codes);
    default: return unpack_chunks<7>(stream, chunks, codes);
  }
}

/* How many sums of two products may be added up in 16 bits: 585 for W3A3, 136 for W4A4, 8 for W6A6, 1
 * for W8A7, and 0 for W8A8, of which not even one fits. */
int64_t safe_steps(const treeq_layer_format& format) {
  const int32_t pair = 2 * ((1 << format.weight_bits) - 1) * (1 << (format.act_bits - 1));
  return 32767 / pair;
}
constexpr int64_t kWorthwhileSteps = 4;  // fewer are widened at once, in registers

/* One token's four inputs times 2 x 8 channels, two products a lane. In assembly, because gcc hoists
 * the broadcasts of an intrinsic and spills the sums. */
TREEQ_INLINE void accumulate(__m256i& low, __m256i& high, const int32_t* x, __m256i w0, __m256i w1) {
  __m256i inputs, product;
  asm("vpbroadcastd %4, %2\n\t"
      "vpmaddubsw %2, %5, %3\n\tvpaddw %3, %0, %0\n\t"
      "vpmaddubsw %2, %6, %2\n\tvpaddw %2, %1, %1"
      : "+x"(low), "+x"(high), "=&x"(inputs), "=&x"(product)
      : "m"(*x), "x"(w0), "x"(w1));
}

/* 16-bit sums into the 32-bit sums of the same channels, which the first block replaces. */
TREEQ_INLINE void widen(__m256i sum, bool is_first, int32_t* sums) {
  __m256i* to = reinterpret_cast<__m256i*>(sums);
  const __m256i wide = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  _mm256_storeu_si256(to, is_first ? wide : _mm256_add_epi32(wide, _mm256_loadu_si256(to)));
}

/* kRows tokens and 16 channels, `steps` words in 16 bits before they are widened. 6 x 2 sums, two
 * registers of codes, inputs and products: all 16. */
template <int kRows>
TREEQ_NOINLINE void multiply_narrow(const uint8_t* codes, const int32_t* x, int stride,
                                    int64_t words, int64_t steps, int32_t* sums) {
  for (int64_t begin = 0; begin < words; begin += steps) {
    const int64_t count = words - begin < steps ? words - begin : steps;
    __m256i sum[kRows][2];
    TREEQ_UNROLL
    for (int t = 0; t < kRows; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
    for (int64_t w = 0; w < count; ++w, codes += 2 * kVector, x += stride) {
      const __m256i w0 = load_codes(codes), w1 = load_codes(codes + kVector / 2);
      TREEQ_UNROLL
      for (int t = 0; t < kRows; ++t) accumulate(sum[t][0], sum[t][1], x + t, w0, w1);
    }
    TREEQ_UNROLL
    for (int t = 0; t < kRows; ++t) {
      widen(sum[t][0], begin == 0, sums + t * kTile);
      widen(sum[t][1], begin == 0, sums + t * kTile + 8);
    }
  }
}

/* kRows tokens and 16 channels, where fewer sums of two products fit: each is widened at once. */
template <int kRows>
TREEQ_NOINLINE void multiply_widened(const uint8_t* codes, const int32_t* x, int stride,
                                     int64_t words, int32_t* sums) {
  __m256i sum[kRows][2];
  const __m256i ones = _mm256_set1_epi16(1);
  TREEQ_UNROLL
  for (int t = 0; t < kRows; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
  for (int64_t w = 0; w < words; ++w, codes += 2 * kVector, x += stride) {
    const __m256i w0 = load_codes(codes), w1 = load_codes(codes + kVector / 2);
    TREEQ_UNROLL
    for (int t = 0; t < kRows; ++t) {
      const __m256i inputs = _mm256_set1_epi32(x[t]);
      const __m256i low = _mm256_maddubs_epi16(w0, inputs), high = _mm256_maddubs_epi16(w1, inputs);
      sum[t][0] = _mm256_add_epi32(sum[t][0], _mm256_madd_epi16(low, ones));
      sum[t][1] = _mm256_add_epi32(sum[t][1], _mm256_madd_epi16(high, ones));
    }
  }
  TREEQ_UNROLL
  for (int t = 0; t < kRows; ++t) {
    TREEQ_UNROLL
    for (int h = 0; h < 2; ++h)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + t * kTile + 8 * h), sum[t][h]);
  }
}

/* W8A8: not even two products fit 16 bits, so inputs and codes are widened before they are multiplied,
 * each word of four into its even and its odd two. */
constexpr int kWideWords = 64;  // of a block whose inputs are widened once for 32 channels
struct WideInputs {
  int32_t even[kWideWords * kMaxRows], odd[kWideWords * kMaxRows];
};

/* Reads up to 7 words behind the last one: other parts of a run's workspace follow the codes. */
void widen_inputs(const int32_t* x, int64_t count, WideInputs& inputs) {
  for (int64_t i = 0; i < count; i += 8) {
    const __m256i four = load_codes(x + i);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(inputs.even + i),
                        _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(inputs.odd + i), _mm256_srai_epi16(four, 8));
  }
}

TREEQ_INLINE void accumulate_wide(__m256i& sum, const int32_t* even, const int32_t* odd,
                                  __m256i even_codes, __m256i odd_codes) {
  __m256i product;
  asm("vpbroadcastd %2, %1\n\tvpmaddwd %1, %4, %1\n\tvpaddd %1, %0, %0\n\t"
      "vpbroadcastd %3, %1\n\tvpmaddwd %1, %5, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sum), "=&x"(product)
      : "m"(*even), "m"(*odd), "x"(even_codes), "x"(odd_codes));
}

/* kRows tokens from row `first`, 16 channels and the words of a block, added to the earlier blocks. */
template <int kRows>
TREEQ_NOINLINE void multiply_wide(const uint8_t* codes, const WideInputs& inputs, int first,
                                  int stride, int64_t words, bool is_first, int32_t* sums) {
  __m256i sum[kRows][2];
  TREEQ_UNROLL
  for (int t = 0; t < kRows; ++t) sum[t][0] = sum[t][1] = _mm256_setzero_si256();
  const int32_t *even = inputs.even + first, *odd = inputs.odd + first;
  for (int64_t w = 0; w < words; ++w, codes += 2 * kVector, even += stride, odd += stride) {
    TREEQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      const __m256i four = load_codes(codes + h * kVector / 2);
      const __m256i even_codes = _mm256_and_si256(four, _mm256_set1_epi16(255));
      const __m256i odd_codes = _mm256_srli_epi16(four, 8);
      TREEQ_UNROLL
      for (int t = 0; t < kRows; ++t)
        accumulate_wide(sum[t][h], even + t, odd + t, even_codes, odd_codes);
    }
  }
  TREEQ_UNROLL
  for (int t = 0; t < kRows; ++t) {
    TREEQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      __m256i* to = reinterpret_cast<__m256i*>(sums + t * kTile + 8 * h);
      _mm256_storeu_si256(
          to, is_first ? sum[t][h] : _mm256_add_epi32(sum[t][h], _mm256_loadu_si256(to)));
    }
  }
}

void multiply_wide_panel(const uint8_t* codes, const int32_t* x, int rows, int64_t words,
                         int32_t* sums) {
  WideInputs inputs;
  for (int64_t begin = 0; begin < words; begin += kWideWords) {
    const int64_t count = words - begin < kWideWords ? words - begin : kWideWords;
    widen_inputs(x + begin * rows, count * rows, inputs);
    for (int half = 0; half < 2; ++half)
      for_rows<6>(rows, [&](auto size, int t) {
        multiply_wide<decltype(size)::value>(codes + (begin * 2 + half) * kVector, inputs, t, rows,
                                             count, begin == 0, sums + t * kTile + half * kLanes);
      });
  }
}

void multiply_panel(const uint8_t* codes, const int32_t* x, int rows, int64_t words,
                    const treeq_layer_format& format, int32_t* sums) {
  const int64_t steps = safe_steps(format);
  if (!steps) return multiply_wide_panel(codes, x, rows, words, sums);
  for (int half = 0; half < 2; ++half, codes += kVector, sums += kLanes) {
    if (steps >= kWorthwhileSteps)
      for_rows<6>(rows, [&](auto size, int t) {
        multiply_narrow<decltype(size)::value>(codes, x + t, rows, words, steps, sums + t * kTile);
      });
    else
      for_rows<4>(rows, [&](auto size, int t) {
        multiply_widened<decltype(size)::value>(codes, x + t, rows, words, sums + t * kTile);
      });
  }
}

/* Up to this many tokens are multiplied straight from the stream: memory is what limits them. */
constexpr int kMaxPackedRows = 2;
constexpr int kPrefetchBytes = 2048;

bool can_multiply_packed(int64_t m, const treeq_layer_format& format) {
  return m <= kMaxPackedRows && safe_steps(format) >= kWorthwhileSteps;
}

template <int kBits, int kRows>
TREEQ_NOINLINE void multiply_packed_rows(const uint8_t* stream, const int32_t* x, int64_t chunks,
                                         int64_t steps, int32_t* sums) {
  const int64_t block = steps / 2;  // a chunk is two words
  for (int64_t begin = 0; begin < chunks; begin += block) {
    const int64_t count = chunks - begin < block ? chunks - begin : block;
    __m256i sum[kRows][4];
    TREEQ_UNROLL
    for (int i = 0; i < 4 * kRows; ++i) sum[i / 4][i % 4] = _mm256_setzero_si256();
    for (int64_t c = 0; c < count; ++c, x += 2 * kRows, stream += chunk_bytes(kBits)) {
      for (size_t byte = 0; byte < chunk_bytes(kBits); byte += kVector)
        _mm_prefetch(reinterpret_cast<const char*>(stream + kPrefetchBytes + byte), _MM_HINT_T0);
      TREEQ_UNROLL
      for (int j = 0; j < kVectors; ++j) {
        const __m256i w0 = unpack_half<kBits>(stream, j, 0), w1 = unpack_half<kBits>(stream, j, 1);
        TREEQ_UNROLL
        for (int t = 0; t < kRows; ++t)
          accumulate(sum[t][j % 2 * 2], sum[t][j % 2 * 2 + 1], x + j / 2 * kRows + t, w0, w1);
      }
    }
    TREEQ_UNROLL
    for (int i = 0; i < 4 * kRows; ++i)
      widen(sum[i / 4][i % 4], begin == 0, sums + i / 4 * kTile + i % 4 * 8);
  }
}

template <int kBits>
void multiply_packed_bits(const uint8_t* stream, const int32_t* x, int rows, int64_t chunks,
                          int64_t steps, int32_t* sums) {
  if (rows == 1) return multiply_packed_rows<kBits, 1>(stream, x, chunks, steps, sums);
  multiply_packed_rows<kBits, 2>(stream, x, chunks, steps, sums);
}

void multiply_packed(const uint8_t* stream, const int32_t* x, int rows, int64_t chunks,
                     const treeq_layer_format& format, int32_t* sums) {
  const int64_t steps = safe_steps(format);
  switch (format.weight_bits) {
    case 2: return multiply_packed_bits<2>(stream, x, rows, chunks, steps, sums);
    case 3: return multiply_packed_bits<3>(stream, x, rows, chunks, steps, sums);
    case 4: return multiply_packed_bits<4>(stream, x, rows, chunks, steps, sums);
    case 5: return multiply_packed_bits<5>(stream, x, rows, chunks, steps, sums);
    case 6: return multiply_packed_bits<6>(stream, x, rows, chunks, steps, sums);
    case 7: return multiply_packed_bits<7>(stream, x, rows, chunks, steps, sums);
    default: return multiply_packed_bits<8>(stream, x, rows, chunks, steps, sums);
  }
}

#include "generic.inl"

int32_t peak(int64_t iterations, int64_t* num_operations) {
  constexpr int kSums = 8;
  __m256i sum[kSums];
  TREEQ_UNROLL
  for (int i = 0; i < kSums; ++i) sum[i] = _mm256_setzero_si256();
  const __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  __m256i product;
  for (int64_t n = 0; n < iterations; ++n) {
    TREEQ_UNROLL
    for (int i = 0; i < kSums; ++i)
      asm volatile("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0"
                   : "+x"(sum[i]), "=&x"(product)
                   : "x"(a), "x"(b));
  }
  *num_operations = iterations * kSums * 32 * 2;
  __m256i all = sum[0];
  TREEQ_UNROLL
  for (int i = 1; i < kSums; ++i) all = _mm256_xor_si256(all, sum[i]);
  return _mm_cvtsi128_si32(_mm256_castsi256_si128(all));
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2", prepare_panel, run_tiles, peak};
  return &kernels;
}

}  // namespace treeq
