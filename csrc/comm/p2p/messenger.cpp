#include "comm/p2p/messenger.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace mlsys::comm {
namespace {

using Clock = std::chrono::steady_clock;

// How often a receive is checked for having become hopeless.
constexpr int kTickMs = 100;
// How often the reason for a broken connection is looked for.
constexpr int kDoubtMs = 10;

}  // namespace

Messenger::Messenger(const Options& options, std::function<Links&()> links)
    : options_(options),
      connect_(std::move(links)),
      wake_(make_eventfd()),
      mailbox_(options.rank, [ranks = options.global_ranks](int rank) {
        return ranks.empty() || rank < 0 ? rank : ranks[static_cast<size_t>(rank)];
      }) {}

std::shared_ptr<Request> Messenger::send(const void* data, size_t bytes, int destination, uint64_t tag) {
  auto* source = static_cast<std::byte*>(const_cast<void*>(data));  // only read
  return enqueue(
      std::make_shared<MessageState>(MessageState::Direction::kSend, source, bytes, destination, tag));
}

std::shared_ptr<Request> Messenger::receive(void* data, size_t bytes, int source, uint64_t tag) {
  auto* target = static_cast<std::byte*>(data);
  return enqueue(
      std::make_shared<MessageState>(MessageState::Direction::kReceive, target, bytes, source, tag));
}

std::shared_ptr<Request> Messenger::enqueue(std::shared_ptr<MessageState> state) {
  auto request = std::make_shared<MessageRequest>(mutex_, state, informant_, options_.timeout);
  {
    const std::lock_guard lock(*mutex_);
    if (broken_) {
      ended_.push_back({state, -1, broken_});
    } else if (state->direction == MessageState::Direction::kReceive) {
      mailbox_.post(state);
    } else if (state->peer == options_.rank) {
      const auto message =
          mailbox_.begin(options_.rank, {MessageHeader::Kind::kEager, state->tag, state->bytes, 0, 0});
      while (message->received < message->bytes) {
        const std::span<std::byte> room = mailbox_.room(*message, message->bytes);
        std::copy_n(state->data + message->received, room.size(), room.data());
        mailbox_.advance(message, room.size());
      }
      ended_.push_back({state, options_.rank, nullptr});
    } else {
      Outbound& outbound = outbound_[state->peer];
      if (state->bytes <= MessageHeader::kMostEager) {
        outbound.queue.push_back({{MessageHeader::Kind::kEager, state->tag, state->bytes, 0, 0}, state});
      } else {
        const uint64_t id = ++outbound.num_offers;
        outbound.offered[id] = state;
        outbound.queue.push_back({{MessageHeader::Kind::kOffer, state->tag, state->bytes, id, 0}, nullptr});
      }
    }
  }
  flush_ended();
  if (!state->completed()) start();
  return request;
}

void Messenger::start() {
  const std::lock_guard lock(*mutex_);
  if (stopping_) return;
  if (!started_) {
    started_ = true;
    owner_ = ::getpid();
    thread_ = std::thread([this] { run(); });
  }
  raise_eventfd(wake_.get());
}

void Messenger::stop() {
  {
    const std::lock_guard lock(*mutex_);
    stopping_ = true;
  }
  if (thread_.joinable()) {
    if (owner_ != ::getpid()) {
      thread_.detach();
      return;
    }
    raise_eventfd(wake_.get());
    thread_.join();
  }
  {
    const std::lock_guard lock(informant_->mutex);
    informant_->faults = nullptr;
  }
  end_everything(
      std::make_exception_ptr(std::runtime_error("the group was shut down while a message was pending.")));
  const std::lock_guard lock(*mutex_);
  outbound_.clear();
  sources_.clear();
  acceptors_.clear();
}

void Messenger::run() noexcept {
  try {
    Links& links = connect_();
    {
      const std::lock_guard lock(informant_->mutex);
      informant_->faults = links.faults.get();
    }
    acceptors_.emplace_back(std::move(links.message_unix_listener), links.credentials, links.strangers);
    if (links.message_tcp_listener) {
      acceptors_.emplace_back(std::move(links.message_tcp_listener), links.credentials, links.strangers);
    }
    if (options_.make_carrier && links.topology.num_hosts() > 1) {
      const std::lock_guard lock(*mutex_);
      carrier_ = options_.make_carrier(CarrierUse::kMessages);
    }
    for (;;) {
      std::vector<pollfd> waiting = polls(links);
      if (::poll(waiting.data(), waiting.size(), patience_ms()) < 0 && errno != EINTR)
        throw_errno("poll of messages");
      {
        const std::lock_guard lock(*mutex_);
        if (stopping_) return;
      }
      drain_eventfd(wake_.get());
      links.faults->check();
      serve(links);
      flush_ended();
    }
  } catch (...) {
    end_everything(std::current_exception());
  }
}

std::vector<pollfd> Messenger::polls(Links& links) const {
  const std::lock_guard lock(*mutex_);
  std::vector<pollfd> waiting{{wake_.get(), POLLIN, 0}, {links.faults->abort_fd(), POLLIN, 0}};
  for (const Acceptor& acceptor : acceptors_) acceptor.append_polls(waiting);
  for (const auto& [destination, outbound] : outbound_) {
    if (outbound.handshake != nullptr) {
      const bool writing = outbound.handshake->wants_to_write();
      waiting.push_back({outbound.handshake->fd(), static_cast<short>(writing ? POLLOUT : POLLIN), 0});
    } else if (outbound.socket) {
      const auto events = static_cast<short>(outbound.queue.empty() ? POLLIN : POLLIN | POLLOUT);
      waiting.push_back({outbound.socket.fd(), events, 0});
    }
  }
  for (const Source& source : sources_) {
    const auto events = static_cast<short>(source.replies.empty() ? POLLIN : POLLIN | POLLOUT);
    waiting.push_back({source.socket.fd(), events, 0});
  }
  return waiting;
}

int Messenger::patience_ms() const {
  const std::lock_guard lock(*mutex_);
  const auto any = [](const auto& connections, const auto& is) {
    return std::any_of(connections.begin(), connections.end(), is);
  };
  if (any(sources_, [](const Source& source) { return !source.fetching.empty(); })) return 0;
  const bool doubts = any(sources_, [](const Source& source) { return !source.failure.empty(); }) ||
                      any(outbound_, [](const auto& entry) { return !entry.second.failure.empty(); });
  const int patience = doubts ? kDoubtMs : kTickMs;
  return carried_.empty() ? patience : std::min(patience, carrier_->longest_sleep_ms());
}

void Messenger::serve(Links& links) {
  const std::lock_guard lock(*mutex_);
  for (Acceptor& acceptor : acceptors_) {
    for (Acceptor::Peer& peer : acceptor.progress()) {
      if (peer.purpose == Purpose::kPointToPoint)
        sources_.push_back(
            {peer.rank, ++num_connections_, Socket(std::move(peer.fd)), {}, {}, {}, {}, {}, {}, {}, {}});
    }
  }
  for (auto& [destination, outbound] : outbound_) {
    if (outbound.socket) read_replies(links, destination, outbound);
    if (outbound.waiting() && call(links, destination, outbound)) push(links, destination, outbound);
  }
  for (size_t i = sources_.size(); i-- > 0;) {
    Source& source = sources_[i];
    const bool goes_on = source.failure.empty()
                             ? pull(links, source) && fetch(links, source) && flush_replies(source)
                             : judge_source(links, source);
    if (!goes_on) {
      sources_.erase(sources_.begin() + static_cast<ptrdiff_t>(i));
    }
  }
  answer_claims();
  if (carrier_ != nullptr) move_carried(links);
  end_hopeless(links);
}

// A receive is hopeless when everyone who could send it has left and nothing of theirs is still on its way.
void Messenger::end_hopeless(Links& links) {
  const auto gone = [&](int rank) {
    return links.faults->has_left(rank) &&
           std::none_of(sources_.begin(), sources_.end(), [&](const Source& s) { return s.peer == rank; });
  };
  mailbox_.end_if([&](const MessageState& receive) -> std::exception_ptr {
    if (receive.peer >= 0) {
      return receive.peer != options_.rank && gone(receive.peer)
                 ? peer_failed(links, receive.peer, "left the group")
                 : nullptr;
    }
    int last = -1;
    for (int rank = 0; rank < options_.size; ++rank) {
      if (rank == options_.rank) continue;
      if (!gone(rank)) return nullptr;
      last = rank;
    }
    return last < 0 ? nullptr
                    : peer_failed(links, last, "left the group, as all others that could have sent");
  });
}

std::exception_ptr Messenger::peer_failed(Links& links, int peer, const std::string& cause) const {
  const Member& member = links.topology.members[static_cast<size_t>(peer)];
  return std::make_exception_ptr(
      PeerFailed(member.global_rank, member.host, member.pid, cause, "send or recv", 0));
}

void Messenger::end_everything(std::exception_ptr error) {
  {
    const std::lock_guard lock(*mutex_);
    if (!broken_) broken_ = error;
    for (auto& [destination, outbound] : outbound_) {
      end_carried(destination, outbound, error);
      for (auto& job : outbound.queue) {
        if (job.state != nullptr) ended_.push_back({job.state, -1, error});
      }
      for (auto& [id, state] : outbound.offered) ended_.push_back({state, -1, error});
      outbound.queue.clear();
      outbound.offered.clear();
    }
    for (Source& source : sources_) {
      end_carried(source, error);
      if (source.message != nullptr) mailbox_.break_off(source.message, error);
      for (auto& [id, message] : source.offers) mailbox_.break_off(message, error);
      source.message = nullptr;
      source.offers.clear();
      source.fetching.clear();
    }
    mailbox_.end_all(error);
    if (carrier_ != nullptr) carrier_->close();
  }
  flush_ended();
}

void Messenger::flush_ended() {
  std::vector<Ended> ended;
  {
    const std::lock_guard lock(*mutex_);
    ended = std::exchange(ended_, {});
    for (Ended& entry : mailbox_.take_ended()) ended.push_back(std::move(entry));
  }
  for (const Ended& entry : ended) entry.state->complete(entry.source, entry.error);
}

}  // namespace mlsys::comm
