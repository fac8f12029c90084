#include "engine/request_channel.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <utility>

#include "core/errors.h"
#include "engine/notifier.h"

namespace batchcore {
namespace {

void merge(CompletionDelta& into, CompletionDelta&& more) {
  into.text += more.text;
  into.token_ids.insert(into.token_ids.end(), more.token_ids.begin(), more.token_ids.end());
  std::move(more.logprobs.begin(), more.logprobs.end(), std::back_inserter(into.logprobs));
  if (more.finish_reason) {
    into.finish_reason = more.finish_reason;
    into.stop_reason = std::move(more.stop_reason);
  }
}

void merge(RequestUpdate& into, RequestUpdate&& more) {
  for (CompletionDelta& delta : more.deltas) {
    const auto same = std::find_if(into.deltas.begin(), into.deltas.end(),
                                   [&](const auto& old) { return old.index == delta.index; });
    if (same == into.deltas.end()) {
      into.deltas.push_back(std::move(delta));
    } else {
      merge(*same, std::move(delta));
    }
  }
  into.finished = more.finished;
  into.error = more.error;
  into.metrics = more.metrics;
}

}  // namespace

void RequestChannel::publish(RequestUpdate update) {
  bool is_news = true;  // what was not taken yet has been announced already
  {
    const std::lock_guard lock(mutex_);
    finished_ = update.finished;
    if (pending_) {
      merge(*pending_, std::move(update));
      is_news = false;
    } else {
      pending_ = std::move(update);
    }
  }
  ready_.notify_all();
  if (is_news && notifier_ != nullptr) notifier_->mark(id_);
}

void RequestChannel::check_process() const {
  if (getpid() != process_) {
    throw EngineError("this request belongs to the process that submitted it, not to a fork of it");
  }
}

std::optional<RequestUpdate> RequestChannel::take() {
  check_process();
  const std::lock_guard lock(mutex_);
  return std::exchange(pending_, std::nullopt);
}

bool RequestChannel::wait(double timeout_s) {
  check_process();
  std::unique_lock lock(mutex_);
  return ready_.wait_for(lock, std::chrono::duration<double>(timeout_s),
                         [this] { return pending_.has_value() || finished_; });
}

bool RequestChannel::is_finished() const {
  const std::lock_guard lock(mutex_);
  return finished_;
}

}  // namespace batchcore
