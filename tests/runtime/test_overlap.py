# Copyright 2026 The trl_diffusion authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Work beside that of the main thread."""

import threading

import pytest
import torch

from trl_diffusion.runtime.overlap import SideWork


def test_in_turn_and_in_another_thread():
    done, go = [], threading.Event()

    def work(number):
        assert go.wait(60)  # the caller is not waited for
        done.append((number, threading.current_thread() is threading.main_thread(), torch.is_grad_enabled()))
        return number

    with SideWork(torch.device("cpu")) as side_work:
        for number in range(3):
            side_work.submit(work, number)
        assert not done
        go.set()
        assert side_work.results() == [0, 1, 2]
    assert done == [(number, False, True) for number in range(3)]


def test_what_is_behind_a_failure_is_not_begun():
    done = []

    def fail():
        raise KeyError("the first")

    with SideWork(torch.device("cpu")) as side_work:
        side_work.submit(fail)
        side_work.submit(done.append, 1)
        with pytest.raises(KeyError, match="the first"):
            side_work.results()
    assert not done


def test_what_has_not_begun_when_the_caller_fails_will_not():
    begun, go, done = threading.Event(), threading.Event(), []

    def wait():
        begun.set()
        assert go.wait(60)

    with pytest.raises(KeyboardInterrupt), SideWork(torch.device("cpu")) as side_work:
        side_work.submit(wait)
        side_work.submit(done.append, 1)
        assert begun.wait(60)
        raise KeyboardInterrupt
    go.set()
    for thread in threading.enumerate():
        if thread.name == "side-work":
            thread.join(60)
            assert not thread.is_alive()
    assert not done
