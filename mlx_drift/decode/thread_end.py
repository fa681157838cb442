"""What MLX keeps of an app's own thread is let go when that thread ends.

MLX would do so itself, after Python has let the thread's `join` return: where the process ends just
then, it aborts ("terminate called without an active exception"). MLX asks that `mx.clear_streams()`
be called at a thread's end (ml-explore/mlx#3395, #4110), which an app's own threads do not know.
"""

import threading

import mlx.core as mx


class _Streams:
    def __del__(self) -> None:
        mx.clear_streams()


_of_this_thread = threading.local()


def clear_streams_at_thread_end() -> None:
    """Has the calling thread's streams cleared when it ends; those of the main thread stay.

    Python drops what a thread's locals hold as that thread's last act, before `join` returns.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main and not hasattr(_of_this_thread, "streams"):
        _of_this_thread.streams = _Streams()
