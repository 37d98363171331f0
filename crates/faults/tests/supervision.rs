//! What supervised threads notice.

use std::fs::File;
use std::io::Read;

use medes_faults::{Call, Verdict, descriptors, own_descriptors, supervise};

#[test]
fn one_call_fails_and_the_others_do_not() {
    let read = || -> std::io::Result<String> {
        let mut text = String::new();
        // On a thread that the supervised one starts.
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| File::open("/proc/self/comm")?.read_to_string(&mut text));
            reader.join().expect("no panic")
        })?;
        Ok(text)
    };
    let mut opened = 0;
    let mut judge = |call: &Call| {
        opened += usize::from(call.number == libc::SYS_openat);
        Verdict::Go
    };
    assert!(!supervise(&mut judge, read).expect("reads").is_empty());
    assert_eq!(opened, 1);
    let judge = |call: &Call| match call.number {
        libc::SYS_openat => Verdict::Fail(libc::EMFILE),
        _ => Verdict::Go,
    };
    let refused = supervise(judge, read).expect_err("refused");
    assert_eq!(refused.raw_os_error(), Some(libc::EMFILE));
    // And nobody else's.
    read().expect("reads");
}

#[test]
fn descriptors_are_counted_for_one_test_alone() {
    let theirs = File::open("/dev/null").expect("opens");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            own_descriptors().expect("a table of its own");
            assert_eq!(descriptors().expect("lists").len(), 3);
            let own = File::open("/dev/zero").expect("opens");
            assert!(descriptors().expect("lists").contains(&"/dev/zero".to_owned()));
            drop(own);
            assert_eq!(descriptors().expect("lists").len(), 3);
        });
    });
    theirs.metadata().expect("still open");
}
