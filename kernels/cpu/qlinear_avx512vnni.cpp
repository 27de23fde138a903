/* AVX-512 with VNNI: vpdpbusd multiplies 64 unsigned weight codes by 64 signed activation codes. */
#include "rows.h"
#include "vectors_avx512.h"

namespace treeq {
namespace {

/* The four vectors of a chunk, and the address behind it. */
template <int kBits>
inline const uint8_t* unpack_chunk(const uint8_t* stream, __m512i v[kVectors]) {
  constexpr Parts parts = parts_of(kBits);
  int shift = 0;
  if (parts.nibbles) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int j = 0; j < 2; ++j) {
      const __m512i bytes = _mm512_loadu_si512(stream + j * kVector);
      v[j] = _mm512_and_si512(bytes, low);
      v[j + 2] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
    }
    stream += kChunkCodes / 2;
    shift = 4;
  }
  if (parts.pairs) {
    const __m512i low = _mm512_set1_epi8(char(3 << shift));
    const __m512i bytes = _mm512_loadu_si512(stream);
    for (int j = 0; j < kVectors; ++j) {
      const int right = 2 * j - shift;
      const __m512i moved =
          right >= 0 ? _mm512_srli_epi16(bytes, unsigned(right > 0 ? right : 0))
                     : _mm512_slli_epi16(bytes, unsigned(right < 0 ? -right : 0));
      const __m512i pair = _mm512_and_si512(moved, low);
      v[j] = parts.nibbles ? _mm512_or_si512(v[j], pair) : pair;
    }
    stream += kVector;
    shift += 2;
  }
  if (parts.singles) {
    const __m512i bit = _mm512_set1_epi8(char(1 << shift));
    for (int j = 0; j < kVectors; ++j) {
      uint64_t mask;
      __builtin_memcpy(&mask, stream + 8 * j, 8);
      v[j] = _mm512_or_si512(v[j], _mm512_maskz_mov_epi8(_cvtu64_mask64(mask), bit));
    }
    stream += kChunkCodes / 8;
  }
  return stream;
}

template <int kBits>
void unpack_chunks(const uint8_t* stream, int64_t chunks, uint8_t* codes) {
  for (int64_t c = 0; c < chunks; ++c, codes += kChunkCodes) {
    __m512i v[kVectors];
    stream = unpack_chunk<kBits>(stream, v);
    for (int j = 0; j < kVectors; ++j) _mm512_store_si512(codes + j * kVector, v[j]);
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

/* One token's four inputs against 2 x 16 channels. In assembly, because gcc 12 hoists the
 * broadcasts of an intrinsic and spills the sums. */
inline void accumulate(__m512i& low, __m512i& high, const int32_t* x, __m512i w0, __m512i w1) {
  __m512i inputs;
  asm("vpbroadcastd %3, %2\n\tvpdpbusd %2, %4, %0\n\tvpdpbusd %2, %5, %1"
      : "+v"(low), "+v"(high), "=&v"(inputs)
      : "m"(*x), "v"(w0), "v"(w1));
}

/* kRows tokens. Few tokens keep two sets of sums, so that the latency of vpdpbusd is hidden. */
template <int kRows>
TREEQ_NOINLINE void multiply_rows(const uint8_t* codes, const int32_t* x, int64_t words, int32_t* sums) {
  constexpr int kSets = kRows <= 3 ? 2 : 1;
  __m512i sum[kSets][kRows][2];
  TREEQ_UNROLL
  for (int i = 0; i < kSets * kRows; ++i)
    sum[i / kRows][i % kRows][0] = sum[i / kRows][i % kRows][1] = _mm512_setzero_si512();
  for (int64_t w = 0; w < words; w += 2, codes += 4 * kVector, x += 2 * kRows) {
    TREEQ_UNROLL
    for (int u = 0; u < 2; ++u) {
      const __m512i w0 = _mm512_load_si512(codes + 2 * u * kVector);
      const __m512i w1 = _mm512_load_si512(codes + (2 * u + 1) * kVector);
      TREEQ_UNROLL
      for (int t = 0; t < kRows; ++t)
        accumulate(sum[u % kSets][t][0], sum[u % kSets][t][1], x + u * kRows + t, w0, w1);
    }
  }
  TREEQ_UNROLL
  for (int t = 0; t < kRows; ++t)
    TREEQ_UNROLL
    for (int h = 0; h < 2; ++h) {
      __m512i total = sum[0][t][h];
      if (kSets == 2) total = _mm512_add_epi32(total, sum[kSets - 1][t][h]);
      _mm512_store_si512(sums + t * kTile + h * kLanes, total);
    }
}

void multiply_panel(const uint8_t* codes, const int32_t* x, int rows, int64_t words,
                    const treeq_layer_format&, int32_t* sums) {
  switch (rows) {
    case 1: return multiply_rows<1>(codes, x, words, sums);
    case 2: return multiply_rows<2>(codes, x, words, sums);
    case 3: return multiply_rows<3>(codes, x, words, sums);
    case 4: return multiply_rows<4>(codes, x, words, sums);
    case 5: return multiply_rows<5>(codes, x, words, sums);
    case 6: return multiply_rows<6>(codes, x, words, sums);
    case 7: return multiply_rows<7>(codes, x, words, sums);
    case 8: return multiply_rows<8>(codes, x, words, sums);
    case 9: return multiply_rows<9>(codes, x, words, sums);
    case 10: return multiply_rows<10>(codes, x, words, sums);
    case 11: return multiply_rows<11>(codes, x, words, sums);
    default: return multiply_rows<12>(codes, x, words, sums);
  }
}

/* Up to this many tokens are multiplied straight from the stream: memory is what limits them. */
constexpr int kMaxPackedRows = 4;
constexpr int kPrefetchBytes = 2048;

bool can_multiply_packed(int64_t m, const treeq_layer_format& format) {
  return m <= kMaxPackedRows && format.weight_bits < 8;
}

template <int kBits, int kRows>
TREEQ_NOINLINE void multiply_packed_rows(const uint8_t* stream, const int32_t* x, int64_t chunks, int32_t* sums) {
  __m512i sum[2][kRows][2];
  TREEQ_UNROLL
  for (int i = 0; i < 2 * kRows; ++i)
    sum[i / kRows][i % kRows][0] = sum[i / kRows][i % kRows][1] = _mm512_setzero_si512();
  for (int64_t c = 0; c < chunks; ++c, x += 2 * kRows) {
    for (size_t byte = 0; byte < chunk_bytes(kBits); byte += kVector)
      _mm_prefetch(reinterpret_cast<const char*>(stream + kPrefetchBytes + byte), _MM_HINT_T0);
    __m512i v[kVectors];
    stream = unpack_chunk<kBits>(stream, v);
    TREEQ_UNROLL
    for (int u = 0; u < 2; ++u)
      TREEQ_UNROLL
      for (int t = 0; t < kRows; ++t)
        accumulate(sum[u][t][0], sum[u][t][1], x + u * kRows + t, v[2 * u], v[2 * u + 1]);
  }
  TREEQ_UNROLL
  for (int t = 0; t < kRows; ++t)
    for (int h = 0; h < 2; ++h)
      _mm512_storeu_si512(sums + t * kTile + h * kLanes,
                          _mm512_add_epi32(sum[0][t][h], sum[1][t][h]));
}

template <int kBits>
void multiply_packed_bits(const uint8_t* stream, const int32_t* x, int rows, int64_t chunks,
                          int32_t* sums) {
  switch (rows) {
    case 1: return multiply_packed_rows<kBits, 1>(stream, x, chunks, sums);
    case 2: return multiply_packed_rows<kBits, 2>(stream, x, chunks, sums);
    case 3: return multiply_packed_rows<kBits, 3>(stream, x, chunks, sums);
    default: return multiply_packed_rows<kBits, 4>(stream, x, chunks, sums);
  }
}

void multiply_packed(const uint8_t* stream, const int32_t* x, int rows, int64_t chunks,
                     const treeq_layer_format& format, int32_t* sums) {
  switch (format.weight_bits) {
    case 2: return multiply_packed_bits<2>(stream, x, rows, chunks, sums);
    case 3: return multiply_packed_bits<3>(stream, x, rows, chunks, sums);
    case 4: return multiply_packed_bits<4>(stream, x, rows, chunks, sums);
    case 5: return multiply_packed_bits<5>(stream, x, rows, chunks, sums);
    case 6: return multiply_packed_bits<6>(stream, x, rows, chunks, sums);
    default: return multiply_packed_bits<7>(stream, x, rows, chunks, sums);
  }
}

#include "generic.inl"

int32_t peak(int64_t iterations, int64_t* num_operations) {
  constexpr int kSums = 16;  // more than latency x throughput anywhere
  __m512i sum[kSums];
  TREEQ_UNROLL
  for (int i = 0; i < kSums; ++i) sum[i] = _mm512_setzero_si512();
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
  for (int64_t n = 0; n < iterations; ++n) {
    TREEQ_UNROLL
    for (int i = 0; i < kSums; ++i)
      asm volatile("vpdpbusd %1, %2, %0" : "+v"(sum[i]) : "v"(a), "v"(b));
  }
  *num_operations = iterations * kSums * kVector * 2;
  __m512i all = sum[0];
  TREEQ_UNROLL
  for (int i = 1; i < kSums; ++i) all = _mm512_xor_si512(all, sum[i]);
  return _mm_cvtsi128_si32(_mm512_castsi512_si128(all));
}

}  // namespace

const Kernels* avx512vnni_kernels() {
  static const Kernels kernels = {"avx512vnni", prepare_panel, run_tiles, peak};
  return &kernels;
}

}  // namespace treeq
