#include "comm/engine.h"

#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "comm/algorithms/hosts.h"
#include "core/dtype.h"

namespace mlsys::comm {

static_assert(static_cast<int>(ElementType::kFloat32) == static_cast<int>(DType::kFloat32) &&
              static_cast<int>(ElementType::kBFloat16) == static_cast<int>(DType::kBFloat16) &&
              static_cast<int>(ElementType::kInt64) == static_cast<int>(DType::kInt64) &&
              static_cast<int>(ElementType::kBool) == static_cast<int>(DType::kBool));

namespace {

Options validated(Options options) {
  if (options.size < 1 || options.rank < 0 || options.rank >= options.size) {
    throw std::invalid_argument("rank " + std::to_string(options.rank) + " is not in a group of size " +
                                std::to_string(options.size) + ". Ranks count from 0.");
  }
  if (!options.global_ranks.empty() && options.global_ranks.size() != static_cast<size_t>(options.size)) {
    throw std::invalid_argument(std::to_string(options.global_ranks.size()) +
                                " global ranks were given for a group of " + std::to_string(options.size) +
                                ". Give one for each rank, or none.");
  }
  return options;
}

}  // namespace

std::shared_ptr<Communicator> Communicator::create(std::shared_ptr<Store> store, Options options) {
  return std::make_shared<Engine>(std::move(store), std::move(options));
}

Engine::Engine(std::shared_ptr<Store> store, Options options)
    : options_(validated(std::move(options))), store_(std::move(store)) {}

Engine::~Engine() { shutdown(); }

void Engine::expect_open() const {
  if (shut_down_.load(std::memory_order_acquire)) {
    throw std::runtime_error("an operation was called on group \"" + options_.group_name +
                             "\" after it was shut down. Create a new group.");
  }
  if (is_forked_child()) {
    throw std::runtime_error("an operation was called on group \"" + options_.group_name +
                             "\" in a child forked from its rank. Only the rank itself can communicate.");
  }
}

bool Engine::is_forked_child() const {
  const pid_t owner = owner_.load(std::memory_order_acquire);
  return owner != 0 && owner != ::getpid();
}

void Engine::check_rank(int rank, const char* what) const {
  if (rank >= 0 && rank < options_.size) return;
  throw std::invalid_argument(std::string(what) + " " + std::to_string(rank) + " is not in a group of size " +
                              std::to_string(options_.size) + ". Expected a rank from 0 to " +
                              std::to_string(options_.size - 1) + ".");
}

Links& Engine::links() {
  if (Links* ready = connected_.load(std::memory_order_acquire)) return *ready;
  const std::lock_guard lock(connecting_);
  if (connect_failure_) std::rethrow_exception(connect_failure_);
  if (links_ == nullptr) {
    expect_open();
    (void)arena();
    try {
      links_ = mlsys::comm::connect(
          store_, options_, [this] { return shut_down_.load(std::memory_order_acquire); },
          [this] {
            if (Messenger* m = messenger()) m->start();
          },
          [this] { tell_of_failure(); });
    } catch (...) {
      connect_failure_ = std::current_exception();
      throw;
    }
    owner_.store(::getpid(), std::memory_order_release);
    connected_.store(links_.get(), std::memory_order_release);
  }
  return *links_;
}

Messenger* Engine::messenger() {
  const std::lock_guard lock(messaging_);
  if (shut_down_.load(std::memory_order_acquire)) return nullptr;
  if (messenger_ == nullptr) {
    messenger_ = std::make_unique<Messenger>(options_, [this]() -> Links& { return links(); });
  }
  return messenger_.get();
}

std::shared_ptr<Arena> Engine::arena() {
  const std::lock_guard lock(arena_mutex_);
  if (arena_ == nullptr || !arena_->is_own()) arena_ = Arena::of_process();
  return arena_;
}

uint64_t Engine::offset_of(const void* data, size_t bytes) const {
  const std::lock_guard lock(arena_mutex_);
  return arena_ == nullptr || data == nullptr ? Descriptor::kNoOffset : arena_->offset_of(data, bytes);
}

std::shared_ptr<void> Engine::allocate(size_t bytes) { return arena()->allocate(bytes); }

bool Engine::in_arena(const void* data, size_t bytes) const {
  return offset_of(data, bytes) != Descriptor::kNoOffset;
}

Descriptor Engine::new_call(OpKind kind, size_t count, int root) const {
  Descriptor call;
  call.kind = kind;
  call.count = count;
  call.root = root;
  call.rank = options_.global_ranks.empty() ? options_.rank
                                            : options_.global_ranks[static_cast<size_t>(options_.rank)];
  return call;
}

Descriptor Engine::new_reduction(OpKind kind, size_t count, int root, const Reduction& reduction) const {
  Descriptor call = new_call(kind, count, root);
  call.dtype = reduction.dtype;
  call.reduce_op = reduction.op;
  call.factor = reduction.factor;
  return call;
}

// The order matters. The descriptor is published first, so that others can compare it whatever happens next;
// then connections are opened, before any wait in shared memory, because only ranks that wait on sockets
// serve callers.
Context Engine::begin(Descriptor call, Timeout timeout, std::span<const std::byte> payload) {
  Links& l = links();
  if (call.kind != OpKind::kConnecting) {
    call.sequence = sequence_.fetch_add(1, std::memory_order_relaxed) + 1;
    live_.operations.fetch_add(1, std::memory_order_relaxed);
  }
  l.faults->check();
  const auto deadline = Clock::now() + (timeout.count() == 0 ? options_.timeout : timeout);
  l.team->publish_payload(call, payload);
  l.team->arrive(call, deadline);
  const OperationGuard guard(*l.faults, l.team->mine(), options_.rank);
  if (l.mesh != nullptr) {
    l.mesh->begin(call, deadline);
    const std::vector<int> neighbours = ring_neighbours(l.topology);
    l.mesh->ensure(neighbours);
    if (!neighbours.empty()) l.mesh->greet(neighbours[0], neighbours[1]);
    l.mesh->ensure(tcp_peers(l.topology, call));
  }
  l.team->await_arrival();
  return {l.topology, *l.faults, *l.team, l.mesh.get(), live_, {*l.faults, l.team->mine(), options_.rank}};
}

std::shared_ptr<Request> Engine::send(const void* data, size_t bytes, int destination, uint64_t tag) {
  expect_open();
  check_rank(destination, "destination");
  Messenger* m = messenger();
  if (m == nullptr) expect_open();  // shut down in between: throws
  return m->send(data, bytes, destination, tag);
}

std::shared_ptr<Request> Engine::recv(void* data, size_t bytes, int source, uint64_t tag) {
  expect_open();
  if (source != kAnySource) check_rank(source, "source");
  Messenger* m = messenger();
  if (m == nullptr) expect_open();
  return m->receive(data, bytes, source, tag);
}

int Engine::num_hosts() const {
  const Links* l = connected_.load(std::memory_order_acquire);
  if (options_.size == 1) return 1;
  return l == nullptr ? 0 : l->topology.num_hosts();
}

Counters Engine::counters() const {
  Counters counters;
  counters.operations = live_.operations.load(std::memory_order_relaxed);
  counters.shm_bytes = live_.shm_bytes.load(std::memory_order_relaxed);
  counters.zero_copy_operations = live_.zero_copy_operations.load(std::memory_order_relaxed);
  const Links* l = connected_.load(std::memory_order_acquire);
  if (l != nullptr) counters.strangers = l->strangers.count();
  if (l != nullptr && l->mesh != nullptr) {
    const bool brought = l->mesh->brings_carrier();
    (brought ? counters.mpi_bytes_sent : counters.tcp_bytes_sent) += l->mesh->carrier().bytes_sent();
    (brought ? counters.mpi_bytes_received : counters.tcp_bytes_received) +=
        l->mesh->carrier().bytes_received();
  }
  const std::lock_guard lock(messaging_);
  if (messenger_ != nullptr) {
    counters.shm_bytes += messenger_->local_bytes_received();  // unix sockets, also inside the host
    counters.tcp_bytes_sent += messenger_->tcp_bytes_sent();
    counters.tcp_bytes_received += messenger_->tcp_bytes_received();
    messenger_->count_carried(&counters);
  }
  return counters;
}

std::string Engine::describe_transports() const {
  const Links* l = connected_.load(std::memory_order_acquire);
  if (options_.size == 1) return "one rank: nothing to transport";
  if (l == nullptr) return "not connected yet";
  std::string text;
  for (const std::vector<int>& host : l->topology.hosts) {
    text += text.empty() ? "" : " | ";
    text += host.size() == 1 ? "rank" : "ranks";
    for (const int rank : host) text += " " + std::to_string(l->topology.global(rank));
    if (host.size() > 1) text += " in shared memory";
  }
  return l->topology.num_hosts() == 1 ? text
                                      : text + "; " + l->mesh->carrier().name() + " between these " +
                                            std::to_string(l->topology.num_hosts()) + " hosts";
}

void Engine::expect_healthy() const {
  expect_open();
  if (const Links* l = connected_.load(std::memory_order_acquire); l != nullptr && l->faults != nullptr) {
    l->faults->check();
  }
}

// The recorded failure goes first: the deaths that follow it are consequences.
void Engine::expect_present(std::span<const int> global_ranks) const {
  const Links* l = connected_.load(std::memory_order_acquire);
  if (l == nullptr) return;
  const auto wanted = [&](int rank) {
    return std::find(global_ranks.begin(), global_ranks.end(), rank) != global_ranks.end();
  };
  const auto fail = [](const Poison& p) {
    throw PeerFailed(p.rank, p.host, p.pid, p.cause, p.op, p.sequence);
  };
  if (l->faults->poisoned()) {
    const Poison poison = l->faults->record();
    if (poison.kind == PoisonKind::kPeerFailed && wanted(poison.rank)) fail(poison);
  }
  for (int rank = 0; rank < options_.size; ++rank) {
    if (!wanted(l->topology.global(rank))) continue;
    const Presence presence = l->faults->presence(rank);
    if (presence == kDead) fail(l->faults->failure_of(rank, "its process died", {}));
    if (presence == kLeft) fail(l->faults->failure_of(rank, "left the job", {}));
  }
}

int Engine::first_stopped(std::span<const int> global_ranks) const {
  const Links* l = connected_.load(std::memory_order_acquire);
  if (l == nullptr) return -1;
  const std::vector<Standing> standings = l->faults->inquire();
  for (size_t rank = 0; rank < standings.size(); ++rank) {
    const int global = l->topology.global(static_cast<int>(rank));
    const bool wanted = std::find(global_ranks.begin(), global_ranks.end(), global) != global_ranks.end();
    if (wanted && standings[rank].state == Standing::State::kStopped) return global;
  }
  return -1;
}

void Engine::on_failure(std::function<void()> callback) {
  {
    const std::lock_guard lock(telling_);
    on_failure_ = std::move(callback);
  }
  // Set before the record is read: either this finds the failure, or the watch thread finds the callback.
  const Links* l = connected_.load(std::memory_order_acquire);
  if (l != nullptr && l->faults != nullptr && l->faults->poisoned()) tell_of_failure();
}

void Engine::tell_of_failure() {
  std::function<void()> callback;
  {
    const std::lock_guard lock(telling_);
    callback.swap(on_failure_);
  }
  if (callback) callback();
}

std::vector<int> Engine::present() const {
  std::vector<int> ranks;
  const Links* l = connected_.load(std::memory_order_acquire);
  for (int rank = 0; l != nullptr && rank < options_.size; ++rank) {
    if (l->faults->presence(rank) == kPresent) ranks.push_back(rank);
  }
  return ranks;
}

bool Engine::has_left(int rank) const {
  check_rank(rank, "rank");
  const Links* l = connected_.load(std::memory_order_acquire);
  return l != nullptr && l->faults->has_left(rank);
}

void Engine::post_notice(const std::string& text) {
  if (const Links* l = connected_.load(std::memory_order_acquire))
    l->faults->post_notice(options_.rank, text);
}

std::string Engine::notice(int rank) const {
  check_rank(rank, "rank");
  const Links* l = connected_.load(std::memory_order_acquire);
  return l == nullptr ? "" : l->faults->notice(rank);
}

void Engine::poison(const std::string& cause) {
  if (options_.size == 1 || shut_down_.load(std::memory_order_acquire) || is_forked_child()) return;
  if (Links* l = connected_.load(std::memory_order_acquire)) {
    Descriptor op;
    op.sequence = sequence();
    if (l->team != nullptr) op.kind = l->team->last_kind();
    l->faults->poison_peer(options_.rank, cause, op);
    l->watch->await_told();
    return;
  }
  publish_failure(*store_, options_, cause);
}

void Engine::shutdown() {
  if (shut_down_.exchange(true, std::memory_order_acq_rel)) return;
  if (is_forked_child()) {
    // The threads, and whatever locks they held, stayed with the parent, which goes on: touch nothing of it.
    (void)links_.release();
    (void)messenger_.release();
    return;
  }
  Links* l = connected_.load(std::memory_order_acquire);
  if (l != nullptr) {
    l->faults->close();
    l->faults->mark(options_.rank, kLeft);
    l->watch->stop();
  }
  {
    const std::lock_guard lock(messaging_);
    if (messenger_ != nullptr) messenger_->stop();
  }
  if (l == nullptr) return;
  const std::lock_guard lock(running_);
  if (l->mesh != nullptr) l->mesh->close();
}

}  // namespace mlsys::comm
