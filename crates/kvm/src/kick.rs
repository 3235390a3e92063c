//! Stopping a vCPU from any thread, with no kick lost.
//!
//! A kick does two things, in this order: it sets `kvm_run.immediate_exit`, which the kernel looks at when it is about to enter the
//! guest, and it sends a signal to the thread that is in `KVM_RUN`, which makes a guest that has been entered leave. A signal that comes too
//! early, between the thread's last look and `KVM_RUN`, is spent for nothing; the flag stands in for it.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Once};

use keel_hypervisor::Kick;
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::sys::RunPage;

/// What a vCPU's thread and its kickers share.
///
/// All accesses are sequentially consistent: a kicker writes the flag and then reads the thread, the thread writes itself and then
/// (in the kernel) reads the flag. One of the two always sees the other.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) page: RunPage,
    /// A kick that `run` has not yet returned for.
    kicked: AtomicBool,
    /// The thread in `run`, or 0.
    thread: AtomicI32,
}

impl Shared {
    pub(crate) fn new(page: RunPage) -> Arc<Self> {
        static HANDLER: Once = Once::new();
        // The signal has to interrupt KVM_RUN, and nothing else: without a handler it would end the process.
        HANDLER.call_once(|| {
            extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
            // A number from SIGRTMIN on is valid, the only thing that could be refused.
            let _ = register_signal_handler(SIGRTMIN(), nothing);
        });
        Arc::new(Shared { page, kicked: AtomicBool::new(false), thread: AtomicI32::new(0) })
    }

    /// This thread is the one to signal from now on.
    pub(crate) fn enter(&self) {
        self.thread.store(thread_id(), Ordering::SeqCst);
    }

    /// No thread is.
    pub(crate) fn leave(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    /// `run` is about to return for all kicks so far. One that comes in the middle of this leaves the flag set, and so makes the next `run`
    /// return too: once too often, never too seldom.
    pub(crate) fn take_kicks(&self) {
        self.page.immediate_exit().store(0, Ordering::SeqCst);
        self.kicked.store(false, Ordering::SeqCst);
    }

    /// Runs `body` with the kernel told to return from `KVM_RUN` at once, and afterwards leaves it told so if a kick has come.
    pub(crate) fn without_entering<R>(&self, body: impl FnOnce() -> R) -> R {
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        let result = body();
        self.page.immediate_exit().store(0, Ordering::SeqCst);
        if self.kicked.load(Ordering::SeqCst) {
            self.page.immediate_exit().store(1, Ordering::SeqCst);
        }
        result
    }
}

impl Kick for Shared {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.page.immediate_exit().store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::SeqCst);
        // A thread that kicks its own vCPU is not in KVM_RUN: the flag alone does.
        if thread != 0 && thread != thread_id() {
            signal(thread);
        }
    }
}

#[allow(unsafe_code, reason = "the calls are not in the standard library")]
fn thread_id() -> i32 {
    // SAFETY: gettid has no arguments and can not fail.
    unsafe { libc::gettid() }
}

#[allow(unsafe_code, reason = "the calls are not in the standard library")]
fn signal(thread: i32) {
    // SAFETY: tgkill reads no memory of ours. It fails only if the thread is gone, which then needs no signal; limited to our own process, it can
    // hit no other one's thread that got the same number.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
}
