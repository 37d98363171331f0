//! Real sandboxes with programs of the host. Needs root.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs;
use std::io::{PipeReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use medes_sandbox::{
    CgroupRoot, Created, Exit, Layout, Mount, Process, Resources, Running, Sandbox, SandboxError,
    SandboxSpec, Seccomp, SmallFile,
};

pub const LONG: Duration = Duration::from_secs(20);

/// An instance of its own, with its cgroups, gone at the end.
pub struct Instance {
    pub root: CgroupRoot,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

impl Instance {
    pub fn new() -> Self {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("medes-sandbox-test-{}-{n}", std::process::id());
        Self { root: CgroupRoot::new(&name).expect("tests run as root") }
    }

    /// A specification for `args` with the host's programs.
    pub fn spec(&self, args: &[&str]) -> SandboxSpec {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        SandboxSpec {
            id: format!("s{n}"),
            hostname: "function".into(),
            mounts: Mount::system(),
            files: SmallFile::system("function"),
            code: None,
            layers: vec![],
            tmp_size_bytes: 16 << 20,
            process: Process {
                args: args.iter().map(|a| (*a).into()).collect(),
                env: vec!["PATH=/usr/local/bin:/usr/bin:/bin".into(), "HOME=/tmp".into()],
                cwd: "/".into(),
                rlimits: vec![],
                oom_score_adj: 500,
            },
            host_uid: 0x7000_0000 + (std::process::id() % 0x1_0000) * 0x100 + n,
            resources: Resources {
                memory_limit_bytes: 256 << 20,
                pids_max: 100,
                cpu_millicores: None,
            },
            layout: Layout::fixed(7),
            seccomp: Seccomp::default(),
            die_with_parent: false,
        }
    }

    pub fn shell(&self, script: &str) -> SandboxSpec {
        self.spec(&["/bin/sh", "-c", script])
    }

    /// A specification for a Python program, with the interpreter that this host has.
    pub fn python(&self, program: &str) -> SandboxSpec {
        let (python, prefix) = find_python();
        let mut spec = self.spec(&[&python, "-c", program]);
        if !prefix.starts_with("/usr") {
            spec.mounts.push(Mount::read_only(prefix));
        }
        spec.process.env.push("PYTHONHASHSEED=0".into());
        spec
    }

    pub fn create(&self, spec: &SandboxSpec) -> Result<(Created, Output), SandboxError> {
        let (out, stdout) = std::io::pipe().unwrap();
        let (err, stderr) = std::io::pipe().unwrap();
        let created = Sandbox::create(&self.root, spec, stdout.into(), stderr.into())?;
        Ok((created, Output { out, err }))
    }

    pub fn start(&self, spec: &SandboxSpec) -> (Running, Output) {
        let (created, output) = self.create(spec).unwrap();
        (created.start().unwrap(), output)
    }

    /// Runs to the end; the exit, standard output and standard error.
    pub fn run(&self, spec: &SandboxSpec) -> (Exit, String, String) {
        let (running, output) = self.start(spec);
        let (out, err) = output.read();
        let exit = running.wait(LONG).unwrap();
        running.destroy(LONG).unwrap();
        (exit, out, err)
    }

    /// The standard output of a shell script that must succeed.
    pub fn output(&self, script: &str) -> String {
        let (exit, out, err) = self.run(&self.shell(script));
        assert_eq!(exit, Exit::Code(0), "{out}{err}");
        out
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let removed = self.root.remove_all(LONG).and_then(|()| self.root.remove());
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

#[derive(Debug)]
pub struct Output {
    pub out: PipeReader,
    pub err: PipeReader,
}

impl Output {
    pub fn read(self) -> (String, String) {
        let Self { mut out, mut err } = self;
        let reader = std::thread::spawn(move || {
            let mut text = Vec::new();
            err.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        });
        let mut text = Vec::new();
        out.read_to_end(&mut text).unwrap();
        (String::from_utf8_lossy(&text).into_owned(), reader.join().unwrap())
    }

    /// Reads standard output up to the end of its first line.
    pub fn line(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        while self.out.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
            line.push(byte[0]);
        }
        String::from_utf8_lossy(&line).into_owned()
    }
}

/// A Python interpreter and its installation prefix.
pub fn find_python() -> (String, String) {
    let code = "import sys; print(sys.executable); print(sys.base_prefix)";
    let output = std::process::Command::new("python3").args(["-c", code]).output().unwrap();
    assert!(output.status.success(), "tests need python3");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines().map(str::to_owned);
    (lines.next().unwrap(), lines.next().unwrap())
}

/// The processes of this machine whose effective user is `uid`.
pub fn processes_of(uid: u32) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse().ok()) else { continue };
        let status = fs::read_to_string(Path::new("/proc").join(&name).join("status"));
        let uids = status.unwrap_or_default();
        let line = uids.lines().find_map(|l| l.strip_prefix("Uid:").map(str::to_owned));
        if line.is_some_and(|l| l.split_whitespace().any(|u| u == uid.to_string())) {
            found.push(pid);
        }
    }
    found
}

/// Lets every user read a directory; temporary ones are their maker's alone.
pub fn open_to_all(dir: &Path) {
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
}
