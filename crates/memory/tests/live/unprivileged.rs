//! Targets that may not call `userfaultfd` themselves, and filtered ones.

use std::os::unix::process::CommandExt;

use crate::harness::{Cgroup, How, Target, evict};
use medes_memory::session::Freezer;

fn cycle(cgroup: &Cgroup, target: &mut Target, how: &How) {
    let mut saved = evict(cgroup, target.pid, how);
    saved.restore();
    saved.userfault.unregister_all().unwrap();
    let mut freezer = cgroup;
    freezer.thaw().unwrap();
    assert_eq!(target.ask("check"), "ok");
}

#[test]
fn a_seccomp_filter_is_suspended_and_comes_back() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn("filtered");
    cgroup.add(target.pid);
    for round in 0..10 {
        let mut how = How::with_events();
        how.userfault.without_privilege = round % 2 == 0;
        how.userfault.keep_in_target = round % 4 < 2;
        cycle(&cgroup, &mut target, &how);
    }
    target.send("break");
    assert!(target.exited(std::time::Duration::from_secs(5)));
}

#[test]
fn a_process_of_another_user_in_namespaces_of_its_own() {
    let cgroup = Cgroup::new();
    let mut target = Target::spawn_with("fork", |command| {
        // SAFETY: only system calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                let flags = libc::CLONE_NEWUSER
                    | libc::CLONE_NEWNS
                    | libc::CLONE_NEWNET
                    | libc::CLONE_NEWIPC
                    | libc::CLONE_NEWUTS;
                if libc::setgid(1000) != 0 || libc::setuid(1000) != 0 || libc::unshare(flags) != 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
    });
    cgroup.add(target.pid);
    for _ in 0..10 {
        cycle(&cgroup, &mut target, &How::with_events());
    }
}
