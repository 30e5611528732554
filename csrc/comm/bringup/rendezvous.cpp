#include "comm/bringup/rendezvous.h"

#include <stdexcept>
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
// For an answer that is not needed, by a rank that has connections to serve.
constexpr milliseconds kAside{20};
// How long a rank that gives up waits for the store to take that down.
constexpr milliseconds kLastWord{20};
// A rank that has not run for this long was stopped.
constexpr milliseconds kStall{200};

// The store did not answer in time.
struct Silent final : std::runtime_error {
  Silent() : std::runtime_error("the store does not answer") {}
};

std::vector<uint8_t> bytes_of(const Poison& poison) {
  const auto bytes = encode(poison_frame(poison));
  return {bytes.begin(), bytes.end()};
}

}  // namespace

Rendezvous::Rendezvous(std::shared_ptr<Store> store, const Options& options, const Identity& mine,
                       Liveness& liveness, std::function<bool()> stop)
    : clerk_(std::move(store)),
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
    clerk_.set(prefix_ + kind + "/" + std::to_string(rank), value, [this] { expect_answer(); });
  } catch (const PeerFailed&) {
    throw;
  } catch (const TimedOut&) {
    throw;
  } catch (const Silent&) {
    time_out(-1, "");
  } catch (const std::exception&) {
    store_is_gone(liveness_.first_dead());
  }
}

// Nothing when the key is missing.
std::optional<std::vector<uint8_t>> Rendezvous::look_up(const std::string& key) {
  return clerk_.look_up(prefix_ + key, [this] { expect_answer(); });
}

void Rendezvous::expect_answer() {
  notice_stall();
  if (stop_()) throw TimedOut("the group was shut down while it was still connecting.");
  heed_job();
  if (Clock::now() >= deadline_) throw Silent();
}

// Whoever was stopped itself finds that its time is over, and the others have given it up.
void Rendezvous::notice_stall() {
  const auto now = Clock::now();
  if (now - ran_at_ > kStall) listens_until_ = now + kGrace;
  ran_at_ = now;
}

std::vector<uint8_t> Rendezvous::get(const std::string& kind, int rank, bool needs_all,
                                     const std::function<void()>& meanwhile) {
  const std::string key = kind + "/" + std::to_string(rank);
  for (int round = 0;; ++round) {
    notice_stall();
    if (stop_()) throw TimedOut("the group was shut down while it was still connecting.");
    if (meanwhile) meanwhile();
    // Looked up first: if the key is missing even after that, the death was no orderly end.
    const int dead = needs_all ? liveness_.first_dead() : (liveness_.is_dead(rank) ? rank : -1);
    try {
      if (auto value = look_up(key)) return std::move(*value);
      if (dead >= 0) {
        throw_first_failure(kGrace);
        throw liveness_.failure_of(dead);
      }
      watch_another();
      heed_failures();
    } catch (const PeerFailed&) {
      throw;
    } catch (const TimedOut&) {
      throw;
    } catch (const Silent&) {
      // Its deadline is this one.
    } catch (const std::exception&) {
      store_is_gone(dead);
    }
    if (Clock::now() >= deadline_) {
      time_out(rank, "has published nothing under " + prefix_ + key + ". It has not come to this group.");
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
  notice_stall();
  heed_job();
  if (Clock::now() - asked_at_ < kBetweenQuestions) return;
  asked_at_ = Clock::now();
  if (clerk_.is_silent()) return;
  try {
    throw_first_failure(kAside);
  } catch (const PeerFailed&) {
    throw;
  } catch (const TimedOut&) {
    throw;
  } catch (const std::exception&) {
    // A store that is gone has nothing to tell; whoever needs it notices by itself.
  }
}

void Rendezvous::throw_first_failure(milliseconds patience) {
  const auto until = Clock::now() + patience;
  const auto bytes = clerk_.look_up(prefix_ + "failed", [&] {
    expect_answer();
    if (Clock::now() >= until) throw Silent();
  });
  const auto frame = bytes ? decode_control_frame(*bytes, options_.size) : std::nullopt;
  if (!frame || frame->type != ControlFrame::Type::kPoison) return;
  raise(frame->poison);
}

void Rendezvous::raise(const Poison& p) const {
  if (p.kind == PoisonKind::kTimedOut) {
    const bool mine = p.rank == global_rank(options_.rank);
    throw TimedOut(mine ? "this rank is out of the group, which gave it up: " + p.cause : p.cause);
  }
  throw PeerFailed(p.rank, p.host, p.pid, p.cause, p.op, p.sequence);
}

Poison Rendezvous::agree_on(const Poison& mine) {
  if (agreed_) return *agreed_;
  for (; Clock::now() < listens_until_; std::this_thread::sleep_for(milliseconds(1))) {
    asked_at_ = {};
    heed_failures();
  }
  agreed_ = mine;
  try {
    const auto until = Clock::now() + (clerk_.is_silent() ? milliseconds(0) : kLastWord);
    const auto earlier = clerk_.set_first(prefix_ + "failed", bytes_of(mine), [until] {
      if (Clock::now() >= until) throw Silent();
    });
    const auto frame = earlier ? decode_control_frame(*earlier, options_.size) : std::nullopt;
    if (frame && frame->type == ControlFrame::Type::kPoison) agreed_ = frame->poison;
  } catch (const std::exception&) {
    // The store is gone or silent: what this rank knows by itself is all there is to tell.
  }
  return *agreed_;
}

int Rendezvous::first_stopped() const {
  if (const int stopped = liveness_.first_stopped(); stopped >= 0) return global_rank(stopped);
  const auto job = options_.job.lock();
  return job ? job->first_stopped(members_) : -1;
}

void Rendezvous::time_out(int awaited, const std::string& what) {
  int culprit = first_stopped();
  std::string text =
      "rank " + std::to_string(global_rank(options_.rank)) + " timed out while connecting the group: ";
  if (culprit >= 0) {
    text += "rank " + std::to_string(culprit) + " is stopped.";
  } else if (awaited >= 0) {
    culprit = global_rank(awaited);
    text += "rank " + std::to_string(culprit) + " " + what;
  } else {
    text += "the store does not answer.";
  }
  give_up({PoisonKind::kTimedOut, culprit, 0, 0, "", "connecting", text});
}

void Rendezvous::explain(const std::exception& error) {
  for (const auto until = Clock::now() + kGrace; Clock::now() < until && !stop_();) {
    if (const int dead = liveness_.first_dead(milliseconds(5)); dead >= 0) throw liveness_.failure_of(dead);
    asked_at_ = {};
    heed_failures();
    std::this_thread::sleep_for(milliseconds(1));
  }
  if (stop_()) return;
  const Poison mine{PoisonKind::kPeerFailed,
                    global_rank(options_.rank),
                    mine_.pid,
                    0,
                    mine_.host,
                    "connecting",
                    error.what()};
  const Poison agreed = agree_on(mine);
  if (agreed.rank != mine.rank) raise(agreed);
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
