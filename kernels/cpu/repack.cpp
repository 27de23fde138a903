#include "repack.h"

#include <algorithm>
#include <cstring>

namespace treeq {
namespace {

constexpr int kWordBits = 32;

/* The low bits of eight bytes. */
uint8_t gather_bits(uint64_t bytes) {
  return uint8_t((bytes & 0x0101010101010101ull) * 0x0102040810204080ull >> 56);
}

/* Unsigned codes of one output channel, K of them in whole words. */
void unpack_channel(const Layer& layer, const int32_t* planes, int64_t n, uint8_t* codes) {
  const int64_t words = (layer.format.in_features + kWordBits - 1) / kWordBits;
  const int64_t plane_words = words * layer.format.out_features;
  for (int64_t w = 0; w < words; ++w)
    for (int part = 0; part < kWordBits; part += 8) {
      uint64_t eight = 0;
      for (int p = 0; p < layer.format.weight_bits; ++p) {
        const uint32_t word = uint32_t(planes[p * plane_words + n * words + w]);
        eight |= spread_bits(word >> part & 255) << p;
      }
      std::memcpy(codes + w * kWordBits + part, &eight, sizeof eight);
    }
}

/* One channel into its place of a tile's codes [num_words][32][4]. */
void place_channel(const Layer& layer, const uint8_t* codes, int64_t channel, uint8_t* tile) {
  for (int64_t g = 0; g < layer.num_groups; ++g) {
    const uint8_t* group = codes + g * layer.group_size;
    uint8_t* out = tile + (g * layer.group_words * kTile + channel) * kInputs;
    const int64_t whole = layer.group_size / kInputs;
    for (int64_t w = 0; w < whole; ++w)
      std::memcpy(out + w * kTile * kInputs, group + w * kInputs, kInputs);
    if (const size_t left = size_t(layer.group_size % kInputs))
      std::memcpy(out + whole * kTile * kInputs, group + whole * kInputs, left);
  }
}

uint8_t* pack_chunk(const uint8_t* codes, int bits, uint8_t* out) {
  if (bits == 8) {
    std::memcpy(out, codes, kChunkCodes);
    return out + kChunkCodes;
  }
  const Parts parts = parts_of(bits);
  int shift = 0;
  if (parts.nibbles) {
    for (int i = 0; i < kChunkCodes / 2; ++i)
      out[i] = uint8_t((codes[i] & 15) | (codes[i + kChunkCodes / 2] & 15) << 4);
    out += kChunkCodes / 2;
    shift = 4;
  }
  if (parts.pairs) {
    for (int i = 0; i < kVector; ++i) {
      unsigned byte = 0;
      for (int j = 0; j < kVectors; ++j)
        byte |= (unsigned(codes[j * kVector + i]) >> shift & 3u) << (2 * j);
      out[i] = uint8_t(byte);
    }
    out += kVector;
    shift += 2;
  }
  if (parts.singles) {
    for (int i = 0; i < kChunkCodes / 8; ++i) {
      uint64_t eight;
      std::memcpy(&eight, codes + 8 * i, sizeof eight);
      out[i] = gather_bits(eight >> shift);
    }
    out += kChunkCodes / 8;
  }
  return out;
}

}  // namespace

Buffer repack_planes(const Layer& layer, const int32_t* planes) {
  Buffer stream = allocate(size_t(layer.num_tiles) * layer.tile_bytes);
  const size_t k = round_up(size_t(layer.format.in_features), kWordBits);
  const size_t tile_codes = size_t(layer.num_words) * kTile * kInputs;
  std::vector<uint8_t> channel(k), tile(tile_codes);
  for (int64_t t = 0; t < layer.num_tiles; ++t) {
    std::fill(tile.begin(), tile.end(), uint8_t(0));
    const int64_t count = std::min<int64_t>(kTile, layer.format.out_features - t * kTile);
    for (int64_t n = 0; n < count; ++n) {
      unpack_channel(layer, planes, t * kTile + n, channel.data());
      place_channel(layer, channel.data(), n, tile.data());
    }
    uint8_t* out = stream.get() + size_t(t) * layer.tile_bytes;
    for (size_t at = 0; at < tile_codes; at += kChunkCodes)
      out = pack_chunk(tile.data() + at, layer.format.weight_bits, out);
  }
  return stream;
}

Buffer tile_channels(const float* values, int64_t out_features, int64_t num_groups) {
  const int64_t tiles = (out_features + kTile - 1) / kTile;
  Buffer buffer = allocate(size_t(tiles * num_groups) * kTile * sizeof(float));
  float* out = reinterpret_cast<float*>(buffer.get());
  for (int64_t n = 0; n < out_features; ++n)
    for (int64_t g = 0; g < num_groups; ++g)
      out[(n / kTile * num_groups + g) * kTile + n % kTile] = values[n * num_groups + g];
  return buffer;
}

std::unique_ptr<BranchStorage> repack_branch(int64_t in_features, int64_t out_features,
                                             int64_t branch_in, int64_t branch_out, int64_t rank,
                                             const float* r, const float* l) {
  auto storage = std::make_unique<BranchStorage>();
  Branch& branch = storage->branch;
  branch = {};
  branch.in_features = in_features;
  branch.out_features = out_features;
  branch.num_in = branch_in;
  branch.num_out = branch_out;
  branch.rank = rank;
  branch.z_width = branch_out * rank;
  branch.r_width = int64_t(round_up(size_t(branch.z_width), kLanes));
  branch.depth = branch_in * rank;

  storage->r = allocate(size_t(in_features * branch.r_width) * sizeof(float));
  float* padded = reinterpret_cast<float*>(storage->r.get());
  for (int64_t k = 0; k < in_features; ++k)
    std::memcpy(padded + k * branch.r_width, r + k * branch.z_width,
                size_t(branch.z_width) * sizeof(float));

  const int64_t tiles = (out_features + kTile - 1) / kTile, block = out_features / branch_out;
  for (int64_t t = 0; t < tiles; ++t) {
    storage->first_segment.push_back(int64_t(storage->segment_block.size()));
    const int64_t last = std::min(out_features, (t + 1) * kTile) - 1;
    for (int64_t o = t * kTile / block; o <= last / block; ++o) storage->segment_block.push_back(o);
  }
  storage->first_segment.push_back(int64_t(storage->segment_block.size()));

  const size_t floats = storage->segment_block.size() * size_t(branch.depth) * kTile;
  storage->l = allocate(floats * sizeof(float));
  float* out = reinterpret_cast<float*>(storage->l.get());
  for (int64_t t = 0; t < tiles; ++t)
    for (int64_t s = storage->first_segment[size_t(t)]; s < storage->first_segment[size_t(t + 1)];
         ++s) {
      const int64_t o = storage->segment_block[size_t(s)];
      const int64_t begin = std::max(t * kTile, o * block);
      const int64_t end = std::min((t + 1) * kTile, (o + 1) * block);
      for (int64_t q = 0; q < branch.depth; ++q)
        std::memcpy(out + (s * branch.depth + q) * kTile + (begin - t * kTile),
                    l + (o * branch.depth + q) * block + (begin - o * block),
                    size_t(end - begin) * sizeof(float));
    }
  branch.r = padded;
  branch.l = out;
  branch.first_segment = storage->first_segment.data();
  branch.segment_block = storage->segment_block.data();
  storage->bytes = size_t(in_features * branch.r_width) * sizeof(float) + floats * sizeof(float);
  return storage;
}

}  // namespace treeq
