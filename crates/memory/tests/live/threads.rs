//! Operations for which there is no thread.

use medes_faults::{Call, Verdict, supervise};
use medes_memory::session::try_on_tracer_thread;

#[test]
fn no_thread_is_an_error() {
    let refuse = |call: &Call| match call.number {
        libc::SYS_clone3 | libc::SYS_clone => Verdict::Fail(libc::EAGAIN),
        _ => Verdict::Go,
    };
    let refused = supervise(refuse, || try_on_tracer_thread(|| unreachable!("never begun")));
    let refused: std::io::Error = refused.map(|(): ()| ()).expect_err("no thread");
    assert_eq!(refused.raw_os_error(), Some(libc::EAGAIN));
    assert_eq!(
        supervise(|_: &Call| Verdict::Go, || try_on_tracer_thread(|| 7)).expect("a thread"),
        7
    );
}
