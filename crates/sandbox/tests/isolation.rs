//! What a program inside a sandbox can see and do, and what it can't.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use common::{Instance, LONG, open_to_all, processes_of};
use medes_sandbox::{Exit, Isolation, Mount, SeccompProfile};

#[test]
fn an_unprivileged_user_in_namespaces_of_its_own() {
    let i = Instance::new();
    let spec = i.shell("echo $(id -u) $(id -g) $(id -G) $(id -un) $(hostname) $$; exec sleep 1000");
    let (running, mut output) = i.start(&spec);
    assert_eq!(output.line(), "1000 1000 1000 sandbox function 1");
    let isolation = Isolation::of(running.pid()).unwrap();
    assert_eq!(isolation.weaknesses(spec.host_uid), [], "{isolation:?}");
    assert_eq!(isolation.uids, [spec.host_uid; 4]);
    assert_eq!(running.cgroup().processes().unwrap(), processes_of(spec.host_uid));
    running.destroy(LONG).unwrap();
    assert_eq!(processes_of(spec.host_uid), Vec::<i32>::new());
}

#[test]
fn a_created_sandbox_is_already_confined() {
    let i = Instance::new();
    let spec = i.shell("true");
    let (created, _output) = i.create(&spec).unwrap();
    assert_eq!(Isolation::of(created.pid()).unwrap().weaknesses(spec.host_uid), []);
    // Of the caller's descriptors only standard input, output, error and the channel are left.
    let fds = fs::read_dir(format!("/proc/{}/fd", created.pid())).unwrap().count();
    assert_eq!(fds, 4);
    created.destroy(LONG).unwrap();
}

#[test]
fn no_capabilities_and_a_filter() {
    let i = Instance::new();
    let status = i.output("cat /proc/self/status");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert!(status.contains(&format!("{set}:\t0000000000000000\n")), "{status}");
    }
    assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
    assert!(status.contains("Seccomp:\t2\n"), "{status}");
    assert!(status.contains("Groups:\t \n"), "{status}");
}

#[test]
fn a_read_only_root_and_a_limited_scratch() {
    let i = Instance::new();
    let out = i.output(
        "for d in / /usr /etc /dev /var/task /opt /proc/sys /root; do \
           touch $d/x 2>/dev/null && echo WRITABLE $d; done; \
         touch /etc/passwd 2>/dev/null && echo WRITABLE passwd; \
         echo a > /tmp/a && cat /tmp/a; echo b > /dev/shm/b && cat /dev/shm/b; \
         dd if=/dev/zero of=/tmp/big bs=1M count=64 2>&1 | grep -o 'No space left on device'; \
         stat -c %s /tmp/big; head -c 3 /dev/zero | wc -c; echo > /dev/null; ls /",
    );
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..3], ["a", "b", "No space left on device"], "{out}");
    let written: u64 = lines[3].parse().unwrap();
    assert!((8 << 20..=16 << 20).contains(&written), "{out}");
    assert_eq!(lines[4], "3");
    assert!(!lines.contains(&".host") && !lines.contains(&"sys"), "{out}");
}

#[test]
fn only_its_own_processes_and_files() {
    let i = Instance::new();
    let out = i.output(
        "ls -d /proc/[0-9]* | wc -l; cat /proc/keys | wc -c; \
         head -c 10 /proc/kcore 2>/dev/null | wc -c; cut -d: -f3 /proc/self/cgroup | sort -u; \
         kill -9 -1; ls /",
    );
    let mut lines = out.lines();
    // The shell, and the ls and wc of the first command.
    assert!(lines.next().unwrap().parse::<u32>().unwrap() <= 3, "{out}");
    assert_eq!([lines.next(), lines.next(), lines.next()], [Some("0"), Some("0"), Some("/")]);
    let known =
        ["bin", "dev", "etc", "lib", "lib32", "lib64", "opt", "proc", "sbin", "tmp", "usr", "var"];
    let others: Vec<&str> = lines.filter(|name| !known.contains(name)).collect();
    assert!(others.is_empty(), "{others:?}");
}

#[test]
fn only_the_loopback_interface() {
    let i = Instance::new();
    let out = i.output("sed 1,2d /proc/net/dev | cut -d: -f1; cat /proc/net/route | wc -l");
    assert_eq!(out.split_whitespace().collect::<Vec<_>>(), ["lo", "1"]);
}

#[test]
fn the_calls_that_reach_out_are_refused() {
    let i = Instance::new();
    let spec = i.python(
        r#"
import ctypes, errno, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(name, nr, *args):
    ctypes.set_errno(0)
    r = libc.syscall(ctypes.c_long(nr), *[ctypes.c_long(a) for a in args])
    print(name, "ok" if r >= 0 else errno.errorcode[ctypes.get_errno()])
for name, nr in dict(mount=165, umount2=166, pivot_root=155, chroot=161, ptrace=101, bpf=321,
        perf_event_open=298, keyctl=250, add_key=248, kexec_load=246, init_module=175,
        userfaultfd=323, process_vm_readv=310, pidfd_getfd=438, open_by_handle_at=304, swapon=167,
        reboot=169, setns=308, unshare=272, open_tree=428, mount_setattr=442, move_mount=429,
        io_uring_setup=425, clone3=435, memfd_secret=447, nonsense=9999).items():
    call(name, nr, 0x10000000, 0, 0, 0)
call("clone-newuser", 56, 0x10000011, 0, 0, 0, 0)
call("clone-newnet", 56, 0x40000011, 0, 0, 0, 0)
call("dispatch", 157, 59, 0, 0, 0, 0)
call("personality", 135, 0x40000)
call("x32", 0x40000000 | 39)
for family in (socket.AF_PACKET, socket.AF_VSOCK, socket.AF_ALG):
    try: socket.socket(family, socket.SOCK_RAW); print("socket ok")
    except OSError as e: print("socket", errno.errorcode[e.errno])
try: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1); print("raw ok")
except OSError as e: print("raw", errno.errorcode[e.errno])
try: os.setuid(0); print("setuid ok")
except OSError as e: print("setuid", errno.errorcode[e.errno])
try: os.mknod("/tmp/d", 0o60666, os.makedev(8, 0)); print("mknod ok")
except OSError as e: print("mknod", errno.errorcode[e.errno])
"#,
    );
    let (exit, out, err) = i.run(&spec);
    assert_eq!(exit, Exit::Code(0), "{out}{err}");
    let absent = ["io_uring_setup", "clone3", "memfd_secret", "nonsense", "x32"];
    for line in out.lines() {
        let (name, result) = line.split_once(' ').unwrap();
        let want = match name {
            "setuid" => "EINVAL",
            "socket" => "EAFNOSUPPORT",
            n if absent.contains(&n) => "ENOSYS",
            _ => "EPERM",
        };
        assert_eq!(result, want, "{name}");
    }
    assert_eq!(out.lines().count(), 37, "{out}");
}

#[test]
fn a_foreign_architecture_is_death() {
    let i = Instance::new();
    // mov $20, %eax; int $0x80; ret: a 32-bit system call.
    let spec = i.python(
        "import ctypes, mmap\n\
         m = mmap.mmap(-1, 4096, prot=7)\n\
         m.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')\n\
         a = ctypes.addressof(ctypes.c_char.from_buffer(m))\n\
         print(ctypes.CFUNCTYPE(ctypes.c_int)(a)())",
    );
    let (exit, out, _) = i.run(&spec);
    assert_eq!(exit, Exit::Signal(libc::SIGSYS), "{out}");
}

#[test]
fn io_uring_by_choice() {
    let i = Instance::new();
    let program = "import ctypes\n\
        libc = ctypes.CDLL(None, use_errno=True)\n\
        p = (ctypes.c_char * 120)()\n\
        print(libc.syscall(425, 4, p) >= 0, ctypes.get_errno())";
    let mut spec = i.python(program);
    for profile in [SeccompProfile::Default, SeccompProfile::Unconfined] {
        spec.seccomp.profile = profile;
        spec.seccomp.deny_io_uring = true;
        assert_eq!(i.run(&spec).1, format!("False {}\n", libc::ENOSYS));
        spec.seccomp.deny_io_uring = false;
        assert_eq!(i.run(&spec).1, "True 0\n");
    }
}

#[test]
fn set_user_id_programs_give_nothing() {
    let i = Instance::new();
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("id");
    fs::copy("/usr/bin/id", &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    open_to_all(dir.path());
    let mut spec = i.spec(&["/var/task/id", "-u"]);
    spec.code = Some(dir.path().into());
    assert_eq!(i.run(&spec).1, "1000\n");
}

#[test]
fn code_layers_and_mounts_are_where_they_belong() {
    let i = Instance::new();
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let make = |path: &str, contents: &str| {
        let path = dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
    };
    make("code/app.py", "code\n");
    make("one/python/a", "a of one\n");
    make("one/python/b", "b of one\n");
    make("two:x,y\\z/python/b", "b of two\n");
    make("data/value", "value\n");
    make("scratch/x", "");
    fs::set_permissions(dir.path().join("scratch"), fs::Permissions::from_mode(0o777)).unwrap();
    let mut spec = i.shell(
        "cat /var/task/app.py /opt/python/a /opt/python/b /srv/deep/data/value /srv/file; \
         echo new > /srv/scratch/new; touch /var/task/x /opt/x /srv/deep/data/x 2>&1 | wc -l; \
         stat -c %a /srv /srv/deep",
    );
    spec.code = Some(dir.path().join("code"));
    spec.layers = vec![dir.path().join("one"), dir.path().join("two:x,y\\z")];
    let mount = |source: &str, target: &str, read_only| Mount {
        source: dir.path().join(source),
        target: target.into(),
        read_only,
    };
    spec.mounts.push(mount("data", "/srv/deep/data", true));
    spec.mounts.push(mount("data/value", "/srv/file", true));
    spec.mounts.push(mount("scratch", "/srv/scratch", false));
    let (exit, out, err) = i.run(&spec);
    assert_eq!(exit, Exit::Code(0), "{out}{err}");
    assert_eq!(out, "code\na of one\nb of two\nvalue\nvalue\n3\n755\n755\n", "{err}");
    assert_eq!(fs::read_to_string(dir.path().join("scratch/new")).unwrap(), "new\n");

    spec.layers.pop();
    spec.process.args = vec!["cat".into(), "/opt/python/b".into()];
    assert_eq!(i.run(&spec).1, "b of one\n");
}
