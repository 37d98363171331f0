//! The thread that makes sandboxes.
//!
//! One thread for all of them, as long as the keeper lives: a sandbox asks the kernel to be killed
//! when its parent dies, and for the kernel the parent is the thread that made it.

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::sync::mpsc;

use medes_sandbox::{CgroupRoot, Running, Sandbox, SandboxSpec, in_network_namespace};
use tokio::sync::oneshot;

/// A sandbox whose program runs.
pub(crate) struct Spawned {
    /// The process and its cgroup.
    pub(crate) running: Running,
    /// The Runtime API's socket in the sandbox's network namespace.
    pub(crate) listener: TcpListener,
    /// The reading end of its standard output and error.
    pub(crate) output: OwnedFd,
}

struct Job {
    spec: SandboxSpec,
    port: u16,
    made: oneshot::Sender<Result<Spawned, String>>,
}

/// The handle of the thread.
pub(crate) struct Spawner {
    jobs: mpsc::Sender<Job>,
}

impl Spawner {
    pub(crate) fn new(root: CgroupRoot) -> std::io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new().name("spawner".into()).spawn(move || {
            for Job { spec, port, made } in queue {
                let spawned = spawn(&root, &spec, port);
                // Nobody waits any more: the sandbox is dropped, which kills it.
                let _ = made.send(spawned);
            }
        })?;
        Ok(Self { jobs })
    }

    pub(crate) async fn spawn(&self, spec: SandboxSpec, port: u16) -> Result<Spawned, String> {
        let (made, wait) = oneshot::channel();
        let gone = || "the keeper's spawner thread is gone".to_owned();
        self.jobs.send(Job { spec, port, made }).map_err(|_| gone())?;
        wait.await.map_err(|_| gone())?
    }
}

fn spawn(root: &CgroupRoot, spec: &SandboxSpec, port: u16) -> Result<Spawned, String> {
    let (output, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)
        .map_err(|e| format!("making the log pipe: {e}"))?;
    let errors = write.try_clone().map_err(|e| format!("making the log pipe: {e}"))?;
    let created = Sandbox::create(root, spec, write, errors).map_err(|e| e.to_string())?;
    let listener = in_network_namespace(created.net_namespace(), move || {
        TcpListener::bind(("127.0.0.1", port))
    })
    .and_then(|bound| bound)
    .and_then(|l| l.set_nonblocking(true).map(|()| l))
    .map_err(|e| format!("listening on port {port} inside the sandbox: {e}"))?;
    let running = created.start().map_err(|e| e.to_string())?;
    Ok(Spawned { running, listener, output })
}
