// Point-to-point messages: one progress thread, started by the first message in or out.
//
// A sender calls the receiver (by unix socket inside a host, by TCP between hosts) and that connection
// carries its messages in one direction, so the two directions of a pair never wait for each other. The
// receiver's thread always reads, into the matching receive or into the mailbox, so a send completes even
// when nobody has asked for it yet. A send is complete when the kernel has taken all of it.
#pragma once

#include <poll.h>

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "comm/auth/acceptor.h"
#include "comm/bringup/links.h"
#include "comm/p2p/mailbox.h"

namespace mlsys::comm {

class Messenger {
 public:
  // `links` connects when that has not happened yet; it is called on the progress thread, so that sending and
  // receiving never wait for other ranks.
  Messenger(const Options& options, std::function<Links&()> links);
  ~Messenger() { stop(); }

  std::shared_ptr<Request> send(const void* data, size_t bytes, int destination, uint64_t tag);
  std::shared_ptr<Request> receive(void* data, size_t bytes, int source, uint64_t tag);
  // Starts the thread if it does not run: somebody wants to deliver a message.
  void start();
  // Ends what is pending with an error and joins. Idempotent.
  void stop();

  uint64_t tcp_bytes_sent() const { return tcp_sent_.load(std::memory_order_relaxed); }
  uint64_t tcp_bytes_received() const { return tcp_received_.load(std::memory_order_relaxed); }
  uint64_t local_bytes_received() const { return local_received_.load(std::memory_order_relaxed); }

 private:
  // Messages to one destination.
  struct Outbound {
    std::deque<std::shared_ptr<MessageState>> queue;
    std::unique_ptr<Handshake> handshake;
    Socket socket;
    size_t moved = 0;  // bytes of the first message, its header included
    std::string failure;
    std::chrono::steady_clock::time_point failed_at;
  };
  // Messages from one source.
  struct Source {
    int peer;
    Socket socket;
    std::vector<uint8_t> header;
    std::shared_ptr<Inbound> message;
  };

  std::shared_ptr<Request> enqueue(std::shared_ptr<MessageState> state);
  void wake();
  void run() noexcept;
  void serve(Links& links);
  std::vector<pollfd> polls(Links& links) const;
  void accept_sources();
  bool call(Links& links, int destination, Outbound& outbound);
  void push(Links& links, int destination, Outbound& outbound);
  // False when the connection has ended.
  bool pull(Links& links, Source& source);
  void end_hopeless(Links& links);
  void end_everything(std::exception_ptr error);
  void flush_ended();
  std::exception_ptr peer_failed(Links& links, int peer, const std::string& cause) const;

  const Options options_;
  const std::function<Links&()> connect_;
  const UniqueFd wake_;
  // Guards everything down to broken_. Shared with the requests, which may outlive this object.
  const std::shared_ptr<std::mutex> mutex_ = std::make_shared<std::mutex>();
  bool started_ = false;
  bool stopping_ = false;
  std::map<int, Outbound> outbound_;
  std::vector<Source> sources_;
  Mailbox mailbox_;
  std::vector<Ended> ended_;  // sends; the mailbox has its own
  std::exception_ptr broken_;
  std::vector<Acceptor> acceptors_;  // used by the progress thread only
  std::atomic<uint64_t> tcp_sent_{0}, tcp_received_{0}, local_received_{0};
  pid_t owner_ = 0;
  std::thread thread_;
};

}  // namespace mlsys::comm
