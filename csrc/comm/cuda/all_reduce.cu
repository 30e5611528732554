#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>

#include "comm/cuda/all_reduce.h"
#include "comm/cuda/rendezvous.h"
#include "comm/cuda/steps.h"

namespace mlsys::comm::cuda {
namespace {

constexpr int kThreads = 512;
// One shot reads (p-1)n bytes of peers in one wait, two shots 2n(p-1)/p in two: above this the bytes cost
// more.
constexpr size_t kOneShotBytes = 256 << 10;

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error) + " (" +
                           cudaGetErrorName(error) + ").");
}

// Makes a device the current one for a scope.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { (void)cudaSetDevice(before_); }  // it was current before, so it can be again

 private:
  int before_ = 0;
};

// What the device and its host tell each other, in host memory that both see.
struct Notes {
  uint32_t stop;              // host to device
  uint32_t gave_up[kBlocks];  // device to host: 0, or 1 + Waited * 256 + wait * 16 + peer
};

// A rank's memory that peers map: Flags, then two halves of staged data, then two of results.
struct Layout {
  size_t most_bytes;
  static constexpr size_t kFlagBytes = (sizeof(Flags) + 4095) / 4096 * 4096;
  size_t staged_bytes() const { return (most_bytes + 255) / 256 * 256; }
  size_t result_bytes() const {
    return (most_bytes / 2 + kPackBytes + 255) / 256 * 256;
  }  // two ranks or more
  size_t total() const { return kFlagBytes + 2 * staged_bytes() + 2 * result_bytes(); }
};

struct Team {
  std::byte* regions[kMostRanks];
  Notes* notes;
  uint64_t timeout_ns;
  size_t staged_bytes;
  size_t result_bytes;
  int rank;
  int size;
};

struct DeviceMemory {
  const Notes* notes;
  uint64_t timeout;

  __device__ void store_release(uint32_t* flag, uint32_t value) const {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
  }
  __device__ uint32_t load_acquire(const uint32_t* flag) const {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
  }
  __device__ bool stopped() const { return load_acquire(&notes->stop) != 0; }
  __device__ uint64_t now_ns() const {
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
  }
  __device__ uint64_t timeout_ns() const { return timeout; }
};

// All threads of the block call it: what they wrote before is seen by the same block of every rank after it.
// False when this rank shall give up.
__device__ bool meet(const Team& team, int wait, uint32_t call) {
  __shared__ uint32_t gave_up;
  const int block = static_cast<int>(blockIdx.x);
  const int peer = static_cast<int>(threadIdx.x);
  if (threadIdx.x == 0) gave_up = 0;
  __syncthreads();  // and all of the block's writes are before the releases that follow
  if (peer < team.size && peer != team.rank) {
    const DeviceMemory memory{team.notes, team.timeout_ns};
    __threadfence_system();
    arrive(memory, reinterpret_cast<Flags*>(team.regions[peer]), wait, block, team.rank, call);
    const auto* mine = reinterpret_cast<const Flags*>(team.regions[team.rank]);
    const Waited waited = await(memory, mine, wait, block, peer, call);
    if (waited != Waited::kMet) {
      const uint32_t note = 1 + static_cast<uint32_t>(waited) * 256 + static_cast<uint32_t>(wait * 16 + peer);
      memory.store_release(&team.notes->gave_up[block], note);
      gave_up = 1;
    }
  }
  __syncthreads();
  return gave_up == 0;
}

template <class T, bool kTwoShot>
__global__ void __launch_bounds__(kThreads) all_reduce_kernel(Team team, Elements<T> tensor, bool average) {
  auto* flags = reinterpret_cast<Flags*>(team.regions[team.rank]);
  const uint32_t call = flags->calls[blockIdx.x] + 1;
  const size_t half = call % 2;
  Shared shared;
  shared.rank = team.rank;
  shared.size = team.size;
#pragma unroll
  for (int rank = 0; rank < kMostRanks; ++rank) {
    if (rank >= team.size) continue;
    shared.staged[rank] = team.regions[rank] + Layout::kFlagBytes + half * team.staged_bytes;
    shared.results[rank] =
        team.regions[rank] + Layout::kFlagBytes + 2 * team.staged_bytes + half * team.result_bytes;
  }
  const Lane lane{static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                  static_cast<int64_t>(gridDim.x) * kThreads};
  if constexpr (kTwoShot) {
    two_shot_stage(tensor, shared, lane);
    if (!meet(team, 0, call)) return;
    two_shot_reduce(tensor, shared, lane, average);
    if (!meet(team, 1, call)) return;
    two_shot_gather(tensor, shared, lane);
  } else {
    one_shot_stage(tensor, shared, lane);
    if (!meet(team, 0, call)) return;
    one_shot_reduce(tensor, shared, lane, average);
  }
  __syncthreads();  // every thread has read `calls`
  if (threadIdx.x == 0) flags->calls[blockIdx.x] = call;
}

// All blocks are launched for every message, so that a block's number of calls is the group's.
template <class T>
void launch(const Team& team, void* data, size_t count, bool average, cudaStream_t stream) {
  const Elements<T> tensor{static_cast<T*>(data), static_cast<int64_t>(count),
                           reinterpret_cast<uintptr_t>(data) % kPackBytes == 0};
  if (count * sizeof(T) <= kOneShotBytes) {
    all_reduce_kernel<T, false><<<kBlocks, kThreads, 0, stream>>>(team, tensor, average);
  } else {
    all_reduce_kernel<T, true><<<kBlocks, kThreads, 0, stream>>>(team, tensor, average);
  }
  check(cudaGetLastError(), "the launch of the CUDA IPC all-reduce");
}

bool is_captured(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

size_t element_bytes(ElementType dtype) { return dtype == ElementType::kFloat32 ? 4 : 2; }

}  // namespace

struct IpcAllReduce::State {
  int device;
  Layout layout;
  Team team{};
  std::byte* region = nullptr;
  Notes* notes = nullptr;  // as the host addresses it
  std::vector<void*> opened;
  bool ready = false;
  cudaEvent_t last = nullptr;  // after the last call that was not captured
  cudaStream_t last_stream = nullptr;

  // The own region stays until the process ends: peers may still read it, and nobody waits for them here.
  // Errors are not reported: the context may be gone at exit, or broken by an earlier error.
  ~State() {
    int before = 0;
    (void)cudaGetDevice(&before);
    (void)cudaSetDevice(device);
    (void)cudaDeviceSynchronize();
    for (void* peer : opened) (void)cudaIpcCloseMemHandle(peer);
    if (last != nullptr) (void)cudaEventDestroy(last);
    (void)cudaFreeHost(notes);
    (void)cudaSetDevice(before);
  }
};

IpcAllReduce::IpcAllReduce(int device, int rank, int size, size_t most_bytes,
                           std::chrono::milliseconds timeout)
    : state_(std::make_unique<State>()) {
  if (size < 2 || size > kMostRanks || rank < 0 || rank >= size) {
    throw std::invalid_argument("rank " + std::to_string(rank) + " of " + std::to_string(size) +
                                " was given. The CUDA IPC all-reduce takes 2 to " +
                                std::to_string(kMostRanks) + " ranks. Use NCCL for other groups.");
  }
  State& state = *state_;
  state.device = device;
  state.layout.most_bytes = most_bytes;
  const OnDevice guard(device);
  void* memory = nullptr;
  check(cudaMalloc(&memory, state.layout.total()), "cudaMalloc for the CUDA IPC all-reduce");
  state.region = static_cast<std::byte*>(memory);
  check(cudaMemset(memory, 0, state.layout.total()), "cudaMemset");
  check(cudaHostAlloc(&memory, sizeof(Notes), cudaHostAllocMapped), "cudaHostAlloc");
  state.notes = new (memory) Notes{};
  check(cudaHostGetDevicePointer(&memory, state.notes, 0), "cudaHostGetDevicePointer");
  check(cudaEventCreateWithFlags(&state.last, cudaEventDisableTiming), "cudaEventCreate");
  // Peers may write flags as soon as they have the handle, so the zeros must be there.
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  state.team.notes = static_cast<Notes*>(memory);
  state.team.timeout_ns = static_cast<uint64_t>(timeout.count()) * 1'000'000;
  state.team.staged_bytes = state.layout.staged_bytes();
  state.team.result_bytes = state.layout.result_bytes();
  state.team.rank = rank;
  state.team.size = size;
  state.team.regions[rank] = state.region;
}

IpcAllReduce::~IpcAllReduce() = default;

std::vector<uint8_t> IpcAllReduce::share() const {
  const OnDevice guard(state_->device);
  cudaIpcMemHandle_t handle;
  check(cudaIpcGetMemHandle(&handle, state_->region), "cudaIpcGetMemHandle");
  const auto* bytes = reinterpret_cast<const uint8_t*>(&handle);
  return {bytes, bytes + sizeof(handle)};
}

void IpcAllReduce::open(const std::vector<std::vector<uint8_t>>& handles) {
  State& state = *state_;
  if (handles.size() != static_cast<size_t>(state.team.size) || state.ready) {
    throw std::invalid_argument(std::to_string(handles.size()) + " handles were given to a group of " +
                                std::to_string(state.team.size) + ". Give every rank's, once.");
  }
  const OnDevice guard(state.device);
  for (int rank = 0; rank < state.team.size; ++rank) {
    if (rank == state.team.rank) continue;
    cudaIpcMemHandle_t handle;
    const auto& bytes = handles[static_cast<size_t>(rank)];
    if (bytes.size() != sizeof(handle)) {
      throw std::invalid_argument("the handle of rank " + std::to_string(rank) + " has " +
                                  std::to_string(bytes.size()) + " bytes; CUDA's have " +
                                  std::to_string(sizeof(handle)) + ". Pass what share() returned.");
    }
    std::copy(bytes.begin(), bytes.end(), reinterpret_cast<uint8_t*>(&handle));
    void* peer = nullptr;
    check(cudaIpcOpenMemHandle(&peer, handle, cudaIpcMemLazyEnablePeerAccess),
          ("cudaIpcOpenMemHandle on the memory of rank " + std::to_string(rank)).c_str());
    state.opened.push_back(peer);
    state.team.regions[rank] = static_cast<std::byte*>(peer);
  }
  state.ready = true;
}

bool IpcAllReduce::takes(ElementType dtype, ReduceOp op) {
  return (dtype == ElementType::kFloat32 || dtype == ElementType::kFloat16 ||
          dtype == ElementType::kBFloat16) &&
         (op == ReduceOp::kSum || op == ReduceOp::kAvg);
}

size_t IpcAllReduce::most_bytes() const { return state_->layout.most_bytes; }

void IpcAllReduce::all_reduce(void* data, size_t count, ElementType dtype, ReduceOp op, void* stream) {
  State& state = *state_;
  if (!takes(dtype, op) || count > most_bytes() / element_bytes(dtype) || !state.ready) {
    throw std::invalid_argument(
        "an all-reduce of " + std::to_string(count) + " elements was asked of the CUDA IPC all-reduce" +
        (state.ready ? "" : " before open()") + ". It takes SUM and AVG of fp32, fp16 and bf16, up to " +
        std::to_string(most_bytes()) + " bytes. Use NCCL for others.");
  }
  if (count == 0) return;
  const OnDevice guard(state.device);
  const bool average = op == ReduceOp::kAvg;
  const auto queue = static_cast<cudaStream_t>(stream);
  const bool captured = is_captured(queue);
  // A captured call cannot wait for one outside its graph; graphs are ordered by who replays them.
  if (!captured && queue != state.last_stream) {
    check(cudaStreamWaitEvent(queue, state.last, 0), "cudaStreamWaitEvent");
  }
  if (dtype == ElementType::kFloat32) {
    launch<float>(state.team, data, count, average, queue);
  } else if (dtype == ElementType::kFloat16) {
    launch<Float16>(state.team, data, count, average, queue);
  } else {
    launch<BFloat16>(state.team, data, count, average, queue);
  }
  if (captured) return;
  check(cudaEventRecord(state.last, queue), "cudaEventRecord");
  state.last_stream = queue;
}

void IpcAllReduce::stop() { std::atomic_ref(state_->notes->stop).store(1, std::memory_order_release); }

std::string IpcAllReduce::failure() const {
  for (uint32_t& gave_up : state_->notes->gave_up) {
    const uint32_t note = std::atomic_ref(gave_up).load(std::memory_order_acquire);
    if (note == 0) continue;
    const auto waited = static_cast<Waited>((note - 1) / 256);
    const std::string peer = "rank " + std::to_string((note - 1) % 16);
    return waited == Waited::kStopped ? "the group failed while the device waited for " + peer
                                      : "the device waited for " + peer + " longer than " +
                                            std::to_string(state_->team.timeout_ns / 1'000'000) + " ms";
  }
  return "";
}

}  // namespace mlsys::comm::cuda
