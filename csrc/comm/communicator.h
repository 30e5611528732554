// The public face of the collectives: what the process-group binding calls, and nothing else.
//
// This header includes no other header of ours, so that a change inside the core, the arena or an algorithm
// does not recompile the binding (torch's headers cost tens of seconds).
//
// Contract. Ranks here are group ranks, 0 <= rank < size. Buffers are dense host memory. Collectives block
// the calling thread and must be called in the same order on all ranks, by one thread at a time;
// point-to-point calls return at once and may be made from any thread. Nothing connects, maps or starts a
// thread before connect() or the first operation, so a process may fork a constructed but unused
// Communicator. Every wait polls the poison flag and has a timeout. Errors are thrown as the exceptions
// below, with values.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace mlsys::comm {

// Values match mlsys::DType (csrc/core/dtype.h), which this header does not include; a static_assert in
// communicator.cpp holds the two together.
enum class ElementType : uint8_t {
  kFloat32,
  kFloat64,
  kFloat16,
  kBFloat16,
  kInt8,
  kUInt8,
  kInt16,
  kInt32,
  kInt64,
  kBool,
};

// kAvg divides by the group size after the sum, in the accumulation type. fp16 and bf16 accumulate in fp32
// and round once. kPremulSum multiplies every input by `factor` first.
enum class ReduceOp : uint8_t { kSum, kAvg, kProduct, kMin, kMax, kBitAnd, kBitOr, kBitXor, kPremulSum };

struct Reduction {
  ElementType dtype;
  ReduceOp op = ReduceOp::kSum;
  double factor = 1.0;  // used by kPremulSum alone
};

// How all_reduce_compressed encodes what travels between hosts. kBFloat16: 2 bytes an element. kInt8: blocks
// of 256 elements with one fp32 scale, 1.02 bytes an element. csrc/comm/codec/codec.h has the formats.
enum class Compression : uint8_t { kBFloat16, kInt8 };

// What moves bytes between hosts (transport/carrier.h), where the binding brings it along.
class Carrier;
// A group has two, each used by one thread at a time, whose bytes never meet.
enum class CarrierUse : uint8_t { kCollectives, kMessages };

// The rendezvous that all ranks of the group share; implemented by the binding on c10d::Store.
class Store {
 public:
  virtual ~Store() = default;
  virtual void set(const std::string& key, const std::vector<uint8_t>& value) = 0;
  // Waits for the key; throws TimedOut when `timeout` passes first, and something else when it cannot be
  // asked.
  virtual std::vector<uint8_t> get(const std::string& key, std::chrono::milliseconds timeout) = 0;
};

class Communicator;

struct Options {
  int rank = 0;
  int size = 1;
  std::string group_name;
  std::vector<int> global_ranks;               // group rank -> rank in the job, for messages
  std::chrono::milliseconds timeout{1800000};  // of one operation, unless the call names its own
  // Locality is proved by passing a memfd over an abstract unix socket, never assumed. When not empty this
  // names for each *global* rank the host it shall be treated as living on, so that tests can fake several
  // hosts. Ranks with different values never try shared memory. Taken from MLSYS_LOCALITY ("0,0,1,1") by the
  // binding.
  std::vector<int> locality;
  // Connections between two ranks of different hosts, the same on all ranks; a large message uses all of
  // them.
  int sockets_per_peer = 2;
  // Makes what moves payload between hosts instead of TCP sockets; called when the group turns out to have
  // several hosts. Null: TCP.
  std::function<std::shared_ptr<Carrier>(CarrierUse)> make_carrier;
  // Proves membership to the data sockets (HMAC or equal strength); the same on all ranks, from the launcher.
  std::string job_key;
  // The connected group of all the job's ranks, when there is one: while this group connects, it is asked
  // about members that die before they come.
  std::weak_ptr<const Communicator> job;
  // Told in words what a user may want to read in the log (connections of strangers), from any thread, at
  // most every few seconds. May be null.
  std::function<void(const std::string&)> report;
};

// A peer left or raised; thrown by every survivor, naming the culprit.
struct PeerFailed : std::runtime_error {
  PeerFailed(int rank, std::string host, int64_t pid, std::string cause, std::string op, uint64_t sequence);
  int rank;  // global rank of the culprit, -1 when unknown
  std::string host;
  int64_t pid;
  std::string cause;
  std::string op;
  uint64_t sequence;
};
// An operation outlived its timeout; what() names the ranks that had not arrived and the last operation of
// each.
struct TimedOut : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// Ranks disagree about the operation, its size, dtype or root; what() says who called what.
struct Mismatch : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Bytes that this rank has moved since construction, by transport. Payload only, no headers.
struct Counters {
  uint64_t operations = 0;
  uint64_t shm_bytes = 0;  // read from, or written to, another rank's shared memory
  uint64_t tcp_bytes_sent = 0;
  uint64_t tcp_bytes_received = 0;
  uint64_t mpi_bytes_sent = 0;  // by what Options::make_carrier made
  uint64_t mpi_bytes_received = 0;
  uint64_t zero_copy_operations = 0;  // reduced in place in the shared arena, without staging
  uint64_t strangers = 0;             // connections that were turned away, since the group connected
};

// A point-to-point operation under way. Destroying a request abandons it (the message is still consumed).
class Request {
 public:
  virtual ~Request() = default;
  virtual bool completed() const = 0;
  // Blocks until done; throws PeerFailed, TimedOut, or what went wrong. Zero timeout means the group's.
  virtual void wait(std::chrono::milliseconds timeout) = 0;
  // Called once from the progress thread before anybody can see that it is done or failed (at once if that
  // already happened): for what must be over when wait() returns.
  virtual void before_completion(std::function<void(bool succeeded)> callback) = 0;
  // Called once from the progress thread when done or failed (at once if that already happened). The callback
  // must be short and must not throw.
  virtual void on_completion(std::function<void()> callback) = 0;
  // Group rank of the sender (for receives from any source), valid when completed; -1 before.
  virtual int source_rank() const = 0;
};

class Communicator {
 public:
  static std::shared_ptr<Communicator> create(std::shared_ptr<Store> store, Options options);
  virtual ~Communicator() = default;

  using Timeout = std::chrono::milliseconds;  // zero: Options::timeout

  // --- collectives; `count` is in elements, sizes named bytes are bytes
  // -------------------------------------
  virtual void all_reduce(void* data, size_t count, Reduction reduction, Timeout timeout) = 0;
  virtual void reduce(void* data, size_t count, Reduction reduction, int root, Timeout timeout) = 0;
  // outputs[r] receives rank r's input; inputs of equal size on all ranks. outputs[rank()] may equal input.
  virtual void all_gather(const void* input, std::span<void* const> outputs, size_t bytes,
                          Timeout timeout) = 0;
  // inputs[r] is this rank's contribution to rank r; `output` may equal inputs[rank()].
  virtual void reduce_scatter(std::span<const void* const> inputs, void* output, size_t count,
                              Reduction reduction, Timeout timeout) = 0;
  // The same results as all_reduce and reduce_scatter up to rounding, combined as one binary tree over the
  // ranks in rank order, whichever hosts they are on: the bits do not depend on the layout of hosts. Between
  // hosts they send more than the plain ones unless every host holds an aligned run of 2^k ranks.
  virtual void all_reduce_tree(void* data, size_t count, Reduction reduction, Timeout timeout) = 0;
  virtual void reduce_scatter_tree(std::span<const void* const> inputs, void* output, size_t count,
                                   Reduction reduction, Timeout timeout) = 0;
  // Sum of fp32 over all ranks, divided by the group size if `average`. Inside a host it is all_reduce; what
  // travels between hosts is encoded. `residual`, when not null, has `count` elements: what encoding lost on
  // this rank so far, added to what it encodes now and updated. The sum of all ranks' residuals is what has
  // not been delivered yet. All ranks get the same bits.
  virtual void all_reduce_compressed(float* data, size_t count, bool average, Compression compression,
                                     float* residual, Timeout timeout) = 0;
  virtual void broadcast(void* data, size_t bytes, int root, Timeout timeout) = 0;
  // `outputs` has size() entries on root and is empty elsewhere.
  virtual void gather(const void* input, std::span<void* const> outputs, size_t bytes, int root,
                      Timeout timeout) = 0;
  // `inputs` has size() entries on root and is empty elsewhere.
  virtual void scatter(std::span<const void* const> inputs, void* output, size_t bytes, int root,
                       Timeout timeout) = 0;
  // Sends send_bytes[r] bytes from inputs[r] to rank r, receives recv_bytes[r] from it; sizes may differ by
  // pair.
  virtual void all_to_all(std::span<const void* const> inputs, std::span<const size_t> send_bytes,
                          std::span<void* const> outputs, std::span<const size_t> recv_bytes,
                          Timeout timeout) = 0;
  virtual void barrier(Timeout timeout) = 0;
  // Connects, which otherwise happens in the first operation; returns when all ranks have. Messages need it
  // where ranks that neither send nor receive them would not come otherwise. It does not count as an
  // operation.
  virtual void connect(Timeout timeout) = 0;

  // --- sharded updates: every rank owns a part of a buffer, reduces it, and produces what all ranks get.
  // Inside a host, with all buffers in the shared arena, each is one pass; elsewhere (several hosts, private
  // memory) they are composed of reduce_scatter and all_gather, with their orders of summation.
  //
  // Rows of size() + 1 ascending element offsets, equal on all ranks: rank r owns [row[r], row[r + 1]) of
  // each.
  using Partition = std::span<const size_t>;
  // Sees elements [first, first + count) of what this rank owns, reduced; in ascending order, tile by tile.
  using OnTile = std::function<void(const void* reduced, size_t first, size_t count)>;
  // What this rank owns of `data` becomes the reduction; the rest keeps this rank's contribution.
  virtual void reduce_shard(void* data, size_t count, Reduction reduction, Partition partition,
                            const OnTile& on_tile, Timeout timeout) = 0;
  // Reduces what this rank owns of `gradients`, tile by tile, without storing it; `update` writes what
  // follows from a tile into the same elements of this rank's `parameters`, from where every rank gets it.
  // With `is_reduced`, reduce_shard has reduced the gradients already. When a rank dies on the way,
  // parameters are old in some tiles and new in others.
  virtual void reduce_scatter_optimize_all_gather(const void* gradients, void* parameters, size_t count,
                                                  Reduction reduction, Partition partition, bool is_reduced,
                                                  const OnTile& update, Timeout timeout) = 0;

  // --- point to point
  // --------------------------------------------------------------------------------------- The buffer must
  // stay valid until the request completes. Messages between a pair with equal tags arrive in order; a
  // receive of another size than was sent fails with Mismatch.
  virtual std::shared_ptr<Request> send(const void* data, size_t bytes, int destination, uint64_t tag) = 0;
  // source == kAnySource takes the first message with that tag from anyone.
  static constexpr int kAnySource = -1;
  virtual std::shared_ptr<Request> recv(void* data, size_t bytes, int source, uint64_t tag) = 0;

  // --- shared arena
  // ----------------------------------------------------------------------------------------- Memory that the
  // other ranks of this host can map: collectives on it need no staging copy. Aligned to 64 bytes and
  // zero-filled. The deleter keeps the arena alive, so memory may outlive the Communicator. Throws
  // std::bad_alloc with a clear what() when the arena's limit is reached.
  virtual std::shared_ptr<void> allocate(size_t bytes) = 0;
  virtual bool in_arena(const void* data, size_t bytes) const = 0;

  // --- life and faults
  // --------------------------------------------------------------------------------------
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual int num_hosts() const = 0;      // sets of ranks that share memory; 0 before the group has connected
  virtual uint64_t sequence() const = 0;  // of the last collective started on this rank
  virtual Counters counters() const = 0;
  // One line in words: which ranks share memory, which go over TCP.
  virtual std::string describe_transports() const = 0;
  // Throws what a wait would throw now: PeerFailed or Mismatch once the group has failed. Does not connect.
  virtual void expect_healthy() const = 0;
  // Throws PeerFailed when one of these ranks of the job is known to have failed, died or left. Knows nothing
  // before the group has connected.
  virtual void expect_present(std::span<const int> global_ranks) const = 0;
  // The first of these ranks of the job whose process is found stopped, or -1. Asks all hosts, with little
  // patience.
  virtual int first_stopped(std::span<const int> global_ranks) const = 0;
  // `callback` is called once when the group fails, on the watch thread (here, if it has failed already). It
  // must be short and must not throw. Replaces an earlier one. Nothing is noticed before the group has
  // connected.
  virtual void on_failure(std::function<void()> callback) = 0;
  // What survivors need to regroup after a failure, once the group has connected (`present` is empty before).
  // The group ranks that are neither known to have died nor to have left, this one among them.
  virtual std::vector<int> present() const = 0;
  // Whether it is known to have left in good order.
  virtual bool has_left(int rank) const = 0;
  // A text of at most 251 characters that every present rank can read, also when the group has failed.
  virtual void post_notice(const std::string& text) = 0;
  virtual std::string notice(int rank) const = 0;
  // Tells all ranks, at once, that this rank fails for `cause`; their waits throw PeerFailed naming it.
  virtual void poison(const std::string& cause) = 0;
  // Orderly end: waits for nothing, joins the threads, closes sockets. Idempotent; also run by the
  // destructor. After an orderly shutdown a peer's later wait on this rank fails with cause "left the group".
  virtual void shutdown() = 0;
};

}  // namespace mlsys::comm
