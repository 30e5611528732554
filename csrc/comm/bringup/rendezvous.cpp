#include "comm/bringup/rendezvous.h"

#include <thread>

#include "comm/fault/control_frame.h"

namespace mlsys::comm {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kLongestPause{20};
// How often a rank that waits asks whether another one has failed where it cannot see.
constexpr milliseconds kBetweenQuestions{50};
// A store that is gone most often died with a rank.
constexpr milliseconds kGrace{300};

std::vector<uint8_t> bytes_of(const Poison& poison) {
  const auto bytes = encode(poison_frame(poison));
  return {bytes.begin(), bytes.end()};
}

}  // namespace

Rendezvous::Rendezvous(std::shared_ptr<Store> store, const Options& options, const Identity& mine,
                       Liveness& liveness, std::function<bool()> stop)
    : store_(std::move(store)),
      options_(options),
      mine_(mine),
      liveness_(liveness),
      stop_(std::move(stop)),
      prefix_("mlsys/" + options.group_name + "/"),
      deadline_(Clock::now() + options.timeout) {
  for (int rank = 0; rank < options.size; ++rank) members_.push_back(global_rank(rank));
}

int Rendezvous::global_rank(int rank) const {
  return options_.global_ranks.empty() ? rank : options_.global_ranks[static_cast<size_t>(rank)];
}

void Rendezvous::put(const std::string& kind, int rank, const std::vector<uint8_t>& value) {
  try {
    store_->set(prefix_ + kind + "/" + std::to_string(rank), value);
  } catch (const std::exception&) {
    store_is_gone(liveness_.first_dead());
  }
}

// Nothing when the key is missing.
std::optional<std::vector<uint8_t>> Rendezvous::look_up(const std::string& key) {
  try {
    return store_->get(prefix_ + key, milliseconds(0));
  } catch (const TimedOut&) {
    return std::nullopt;
  }
}

std::vector<uint8_t> Rendezvous::get(const std::string& kind, int rank, bool needs_all,
                                     const std::function<void()>& meanwhile) {
  const std::string key = kind + "/" + std::to_string(rank);
  for (int round = 0;; ++round) {
    if (stop_()) throw TimedOut("the group was shut down while it was still connecting.");
    if (meanwhile) meanwhile();
    // Looked up first: if the key is missing even after that, the death was no orderly end.
    const int dead = needs_all ? liveness_.first_dead() : (liveness_.is_dead(rank) ? rank : -1);
    try {
      if (auto value = look_up(key)) return std::move(*value);
      if (dead >= 0) {
        throw_first_failure();
        throw liveness_.failure_of(dead);
      }
      watch_another();
      heed_failures();
    } catch (const PeerFailed&) {
      throw;
    } catch (const TimedOut&) {
      throw;
    } catch (const std::exception&) {
      store_is_gone(dead);
    }
    if (Clock::now() >= deadline_) {
      give_up({PoisonKind::kTimedOut, global_rank(rank), 0, 0, "", "connecting",
               "rank " + std::to_string(global_rank(options_.rank)) +
                   " timed out while connecting the group: nothing heard from rank " +
                   std::to_string(global_rank(rank)) + " (store key " + prefix_ + key +
                   "). It has not come to this group, or is stopped."});
    }
    liveness_.sleep(needs_all ? -1 : rank, std::min(milliseconds(1 + round / 4), kLongestPause));
  }
}

void Rendezvous::watch_another() {
  for (int i = 0; i < options_.size; ++i) {
    next_ = (next_ + 1) % options_.size;
    if (next_ == options_.rank || liveness_.knows(next_)) continue;
    const auto bytes = look_up("identity/" + std::to_string(next_));
    const std::optional<Identity> identity = bytes ? decode_identity(*bytes) : std::nullopt;
    if (identity && identity->failure.empty()) liveness_.add(next_, global_rank(next_), *identity, mine_);
    return;
  }
}

void Rendezvous::heed_job() {
  if (const auto job = options_.job.lock()) job->expect_present(members_);
}

void Rendezvous::heed_failures() {
  heed_job();
  if (Clock::now() - asked_at_ < kBetweenQuestions) return;
  asked_at_ = Clock::now();
  try {
    throw_first_failure();
  } catch (const PeerFailed&) {
    throw;
  } catch (const TimedOut&) {
    throw;
  } catch (const std::exception&) {
    // A store that is gone has nothing to tell; whoever needs it notices by itself.
  }
}

void Rendezvous::throw_first_failure() {
  const auto bytes = look_up("failed");
  const auto frame = bytes ? decode_control_frame(*bytes, options_.size) : std::nullopt;
  if (!frame || frame->type != ControlFrame::Type::kPoison) return;
  const Poison& p = frame->poison;
  if (p.kind == PoisonKind::kTimedOut) {
    const bool mine = p.rank == global_rank(options_.rank);
    throw TimedOut(mine ? "this rank is out of the group, which gave it up: " + p.cause : p.cause);
  }
  throw PeerFailed(p.rank, p.host, p.pid, p.cause, p.op, p.sequence);
}

void Rendezvous::give_up(const Poison& mine) {
  try {
    throw_first_failure();
    store_->set(prefix_ + "failed", bytes_of(mine));
  } catch (const PeerFailed&) {
    throw;
  } catch (const TimedOut&) {
    throw;
  } catch (const std::exception&) {
    // The store is gone as well: what this rank knows by itself is all there is to tell.
  }
  if (mine.kind == PoisonKind::kTimedOut) throw TimedOut(mine.cause);
  throw PeerFailed(mine.rank, mine.host, mine.pid, mine.cause, mine.op, mine.sequence);
}

void Rendezvous::store_is_gone(int dead) {
  const std::exception_ptr reason = std::current_exception();
  for (const auto until = Clock::now() + kGrace; dead < 0 && Clock::now() < until && !stop_();) {
    heed_job();
    dead = liveness_.first_dead();
    if (dead < 0) std::this_thread::sleep_for(milliseconds(1));
  }
  if (dead >= 0) throw liveness_.failure_of(dead);
  std::rethrow_exception(reason);
}

}  // namespace mlsys::comm
