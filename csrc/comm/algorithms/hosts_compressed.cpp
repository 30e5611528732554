// All-reduce of fp32 whose bytes between hosts are encoded. Every host sums its ranks at full precision,
// encodes its sum of each slice for the slice's owner, and the owner adds what it decodes to its own,
// unencoded, sum in the order of hosts. It encodes the result once, and every rank, the owner's too, decodes
// that: at most two roundings, and the same bits everywhere.
//
// Residuals. The rank that encodes an element keeps what the encoding lost of it, in its own residual at the
// element's index: of slices of other owners the loss of this host's contribution, of its own slice the loss
// of the result. Ranks of a host encode different elements, so the sum of all ranks' residuals is exactly
// what has not been delivered yet, and a rank's residual is zero where it encodes nothing. Which rank encodes
// what depends on the element count and on who shares a host with whom, nothing else.
#include <array>

#include "comm/algorithms/hosts.h"
#include "comm/algorithms/hosts_owned.h"
#include "comm/codec/codec.h"

namespace mlsys::comm {
namespace {

static_assert(OwnerProtocol::kGrain % Codec::kBlock == 0);
constexpr size_t kSweep = 4096;  // elements: a host's sum and its encoding stay in the second-level cache

class Compressed final : public OwnerProtocol {
 public:
  Compressed(const Reducer& sum, const Codec& codec, float divisor, float* residual)
      : sum_(sum), codec_(codec), divisor_(divisor), residual_(residual) {}

  size_t message_bytes(int, size_t count) const override { return codec_.encoded_bytes(count); }
  size_t result_bytes(size_t count) const override { return codec_.encoded_bytes(count); }

  void contribute(const OwnedPart& part, std::span<const void* const> sources,
                  std::byte* message) const override {
    sweep(part, sources, [&](size_t done, const float* own, float*, size_t n) {
      codec_.encode(own, residual_at(part.element + done), message + codec_.encoded_bytes(part.first + done),
                    n);
    });
  }

  void combine(const OwnedPart& part, std::span<const void* const> sources,
               std::span<const std::byte* const> messages, std::byte* result) const override {
    sweep(part, sources, [&](size_t done, const float* own, float* total, size_t n) {
      const size_t offset = codec_.encoded_bytes(part.first + done);
      std::fill_n(total, n, 0.0F);
      for (const std::byte* message : messages) {
        if (message == nullptr) {
          sum_.merge(total, own, total, n);
        } else {
          codec_.decode_add(message + offset, total, n);
        }
      }
      codec_.encode(total, residual_at(part.element + done), result + offset, n);
    });
  }

  void deliver(const std::byte* result, std::byte* elements, size_t count) const override {
    for (size_t done = 0; done < count; done += kSweep) {
      codec_.decode(result + codec_.encoded_bytes(done),
                    reinterpret_cast<float*>(elements + done * sizeof(float)), std::min(kSweep, count - done),
                    divisor_);
    }
  }

 private:
  float* residual_at(size_t element) const { return residual_ == nullptr ? nullptr : residual_ + element; }

  // visit(elements done, this host's sum of the next ones, room for as many, their number)
  template <class Visit>
  void sweep(const OwnedPart& part, std::span<const void* const> sources, Visit visit) const {
    alignas(64) float own[kSweep];
    alignas(64) float room[kSweep];
    std::vector<const void*> moved(sources.size());
    for (size_t done = 0; done < part.count; done += kSweep) {
      const size_t n = std::min(kSweep, part.count - done);
      for (size_t i = 0; i < sources.size(); ++i) moved[i] = at(sources[i], done * sizeof(float));
      if (moved.size() > 1) sum_.reduce_to_partial(moved, own, n);
      visit(done, moved.size() > 1 ? own : static_cast<const float*>(moved[0]), room, n);
    }
  }

  const Reducer& sum_;
  const Codec& codec_;
  float divisor_;
  float* residual_;
};

}  // namespace

void hosts_reduce_compressed(Context& context, Compression compression, float divisor, float* data,
                             size_t count, float* residual) {
  const Reducer sum({ElementType::kFloat32}, context.topology.size);
  const Codec codec(compression);
  reduce_by_owners(context, Compressed(sum, codec, divisor, residual),
                   owned_by_hosts(context.topology, data, count, sizeof(float)));
}

}  // namespace mlsys::comm
