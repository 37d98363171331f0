//! A private platform: `medes serve` with directories, port, cgroup and user ids of its own, ended
//! with a look at whether it left anything behind.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{self, Answer, Client};
use crate::remains;

/// How long anything may take that the platform does by itself. Long, for a test machine may be
/// busy: what is waited for usually comes in milliseconds.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How a platform is set up, before it starts.
pub struct Setup {
    directory: TempDir,
    settings: toml::Table,
    port: Option<u16>,
}

/// What two platforms can't share. A free port, even if it is used for nothing else: the kernel
/// gives it to one at a time.
#[derive(Clone, Copy)]
struct Number(u16);

/// How a platform failed to start.
pub struct Failed {
    /// The exit code; none after a signal.
    pub code: Option<i32>,
    /// What it wrote.
    pub log: String,
}

/// A platform that runs or, in between, does not. Dropping it ends what runs.
pub struct Platform {
    setup: Setup,
    child: Option<Child>,
    client: Client,
    port: u16,
    number: Number,
}

impl Setup {
    /// A platform whose sandboxes change state only when told to: all periods are an hour.
    pub fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "the platform makes namespaces and cgroups: run these tests as root"
        );
        let directory = tempfile::Builder::new().prefix("medes-e2e-").tempdir().unwrap();
        let data = directory.path().join("data");
        fs::create_dir(&data).unwrap();
        let setup = Self { directory, settings: toml::Table::new(), port: None };
        setup.link_runtimes(&data);
        let data = data.to_str().unwrap().to_owned();
        let run = setup.path("run").to_str().unwrap().to_owned();
        setup
            .set("node", "data_dir", data)
            .set("node", "run_dir", run)
            .set("lifecycle", "idle", "1h")
            .set("lifecycle", "keep_alive", "2h")
            .set("lifecycle", "keep_dedup", "2h")
    }

    /// Sets one key of the configuration.
    pub fn set(mut self, section: &str, key: &str, value: impl Into<toml::Value>) -> Self {
        self.change(section, key, value);
        self
    }

    fn change(&mut self, section: &str, key: &str, value: impl Into<toml::Value>) {
        let empty = toml::Value::Table(toml::Table::new());
        let table = self.settings.entry(section).or_insert(empty);
        table.as_table_mut().unwrap().insert(key.to_owned(), value.into());
    }

    /// Has it listen on this port; a free one if not said.
    pub fn port(mut self, port: u16) -> Self {
        self.port = Some(port);
        self
    }

    /// A path in the platform's own directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Makes the prepared runtimes known in a data directory.
    pub fn link_runtimes(&self, data_dir: &Path) {
        std::os::unix::fs::symlink(runtimes(), data_dir.join("runtimes")).unwrap();
    }

    /// Starts the platform and waits until it answers.
    pub fn start(self) -> Platform {
        let mut platform = self.platform();
        for attempt in 0.. {
            platform.write_config();
            platform.spawn();
            let Err(why) = platform.wait_until_healthy() else { break };
            // Somebody else took the port after it was found free.
            let taken = platform.setup.port.is_none() && platform.log().contains("cannot listen");
            assert!(taken && attempt < 5, "{why}:\n{}", platform.log());
            platform.port = free_port();
            platform.client = Client::new(platform.port);
        }
        platform
    }

    /// Runs a platform that is expected not to start, to its end; then looks at what it left.
    pub fn fail_to_start(self) -> Failed {
        let mut platform = self.platform();
        platform.write_config();
        platform.spawn();
        let status = platform.wait();
        remains::assert_none(platform.directory(), &platform.cgroup(), platform.uid_base());
        Failed { code: status.code(), log: platform.log() }
    }

    fn platform(self) -> Platform {
        let number = Number(free_port());
        let port = self.port.unwrap_or(number.0);
        Platform { setup: self, child: None, client: Client::new(port), port, number }
    }
}

impl Platform {
    /// A platform with the usual settings.
    pub fn start() -> Self {
        Setup::new().start()
    }

    /// Its directory.
    pub fn directory(&self) -> &Path {
        self.setup.directory.path()
    }

    /// Its data directory.
    pub fn data_dir(&self) -> PathBuf {
        self.setup.settings["node"]["data_dir"].as_str().unwrap().into()
    }

    /// Its run directory.
    pub fn run_dir(&self) -> PathBuf {
        self.setup.settings["node"]["run_dir"].as_str().unwrap().into()
    }

    /// Its port on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The name of its cgroup.
    pub fn cgroup(&self) -> String {
        format!("medes-e2e-{}", self.number.0)
    }

    /// The first of the user ids of its sandboxes, beyond what distributions and containers use.
    pub fn uid_base(&self) -> u32 {
        2_200_000_000 + u32::from(self.number.0) * 30_000
    }

    /// The process of `medes serve`.
    pub fn pid(&self) -> i32 {
        self.child.as_ref().expect("it runs").id().cast_signed()
    }

    /// The process of its keeper.
    pub fn keeper(&self) -> i32 {
        fs::read_to_string(self.run_dir().join("keeper.pid")).unwrap().trim().parse().unwrap()
    }

    /// Its own log.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.setup.path("serve.log")).unwrap_or_default()).into()
    }

    /// The HTTP client of this platform.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Deploys one of `tests/e2e/functions` under its own name.
    pub fn deploy(&self, function: &str) {
        self.deploy_as(function, function, json!({}));
    }

    /// Deploys one of `tests/e2e/functions` under another name, or with more settings.
    pub fn deploy_as(&self, name: &str, function: &str, more: Value) {
        let directory = functions().join(function);
        self.deploy_code(name, json!({ "directory": directory }), more).expect_ok();
    }

    /// Deploys any code; gives the platform's answer.
    pub fn deploy_code(&self, name: &str, code: Value, more: Value) -> Answer {
        let mut body = json!({ "runtime": runtime(), "handler": "app.handler", "code": code });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.client.put(&format!("/v1/functions/{name}"), &body)
    }

    /// Sends a function a request.
    pub fn invoke(&self, name: &str, event: &Value) -> Answer {
        self.client.post(&format!("/v1/functions/{name}/invoke"), event.to_string().as_bytes())
    }

    /// Deduplicates a function's warm sandboxes, each of which must succeed. Gives the reports.
    pub fn dedup(&self, name: &str) -> Vec<Value> {
        let answer = self.client.post(&format!("/v1/functions/{name}/dedup"), b"").expect_ok();
        let results = answer["results"].as_array().unwrap().clone();
        for result in &results {
            assert!(result["error"].is_null(), "{result}\n{}", self.log());
        }
        results
    }

    /// All sandboxes as `ps` shows them.
    pub fn sandboxes(&self) -> Vec<Value> {
        let answer = self.client.get("/v1/sandboxes").expect_ok();
        answer["sandboxes"].as_array().unwrap().clone()
    }

    /// What the node's page store holds: base snapshots and images, bytes.
    pub fn page_store(&self) -> (u64, u64) {
        let info = self.client.get("/v1/info").expect_ok();
        let memory = &info["node"]["memory"];
        (memory["base"].as_u64().unwrap(), memory["patches"].as_u64().unwrap())
    }

    /// The states of a function's sandboxes, sorted.
    pub fn states(&self, name: &str) -> Vec<String> {
        let all = self.sandboxes();
        let own = all.iter().filter(|s| s["function"] == name);
        let mut states: Vec<_> = own.map(|s| s["state"].as_str().unwrap().to_owned()).collect();
        states.sort();
        states
    }

    /// Waits until a function's sandboxes are in these states (sorted).
    #[track_caller]
    pub fn wait_for_states(&self, name: &str, states: &[&str]) {
        let mut last = Vec::new();
        let reached = eventually(|| {
            last = self.states(name);
            last == states
        });
        assert!(reached, "{name} has {last:?} instead of {states:?}\n{}", self.log());
    }

    /// Runs a `medes` command against this platform.
    pub fn medes(&self, arguments: &[&str]) -> Output {
        self.medes_command(arguments).output().unwrap()
    }

    /// A `medes` command against this platform, to be run.
    pub fn medes_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        command.args(arguments).env("MEDES_URL", format!("http://127.0.0.1:{}", self.port));
        command.stdin(Stdio::null());
        command
    }

    /// The processes of its sandboxes.
    pub fn sandbox_processes(&self) -> Vec<i32> {
        remains::processes(None, &self.cgroup(), self.uid_base())
    }

    /// Waits until no process of a sandbox is left. A process leaves its cgroup a moment before it
    /// is gone.
    pub fn wait_for_no_sandbox_process(&self) {
        let mut left = Vec::new();
        let none = eventually(|| {
            left = self.sandbox_processes();
            left.is_empty()
        });
        assert!(none, "processes of sandboxes are left: {left:?}");
    }

    /// Ends it in order: it must succeed and leave nothing.
    pub fn stop(mut self) {
        kill(Pid::from_raw(self.pid()), Signal::SIGTERM).unwrap();
        self.ends_in_order();
    }

    /// Waits for the end of a platform that was told to end: it must succeed and leave nothing.
    pub fn ends_in_order(&mut self) {
        let status = self.wait();
        assert!(status.success(), "{status}\n{}", self.log());
        remains::assert_none(self.directory(), &self.cgroup(), self.uid_base());
        let left: Vec<_> = fs::read_dir(self.run_dir()).unwrap().map(|e| e.unwrap()).collect();
        assert!(left.is_empty(), "left in run_dir: {left:?}");
    }

    /// Waits for the end of a platform that was told to leave its sandboxes: it must succeed.
    pub fn leaves(&mut self) {
        let status = self.wait();
        assert!(status.success(), "{status}\n{}", self.log());
        self.child = None;
    }

    /// Changes one key of the configuration, for the next start.
    pub fn set(&mut self, section: &str, key: &str, value: impl Into<toml::Value>) {
        self.setup.change(section, key, value);
        self.write_config();
    }

    /// Kills `medes serve` alone, as a crash would.
    pub fn crash(&mut self) {
        if self.child.is_none() {
            return;
        }
        kill(Pid::from_raw(self.pid()), Signal::SIGKILL).unwrap();
        self.wait();
        self.child = None;
    }

    /// Starts it again after [`Platform::crash`].
    pub fn restart(&mut self) {
        self.spawn();
        self.wait_until_healthy().unwrap_or_else(|why| panic!("{why}:\n{}", self.log()));
    }

    /// Waits until `medes serve` has ended.
    fn wait(&mut self) -> ExitStatus {
        let child = self.child.as_mut().expect("it runs");
        let mut status = None;
        let ended = eventually(|| {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        assert!(ended, "the platform does not end\n{}", self.log());
        status.unwrap()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(program());
        command.arg("serve").arg("--config").arg(self.setup.path("medes.toml"));
        // A signal for the test runner's process group is not for the platform.
        command.stdin(Stdio::null()).process_group(0);
        command
    }

    fn spawn(&mut self) {
        let path = self.setup.path("serve.log");
        let log = File::options().create(true).append(true).open(path).unwrap();
        let mut command = self.command();
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    fn write_config(&self) {
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        let mut settings = self.setup.settings.clone();
        let more: toml::Table = toml::from_str(&format!(
            "api.listen = \"{address}\"\nnode.cgroup = \"{}\"\nnode.uid_base = {}\n\
             log.level = \"info,medes_controller=debug,medes_keeper=debug,medes_node=debug\"",
            self.cgroup(),
            self.uid_base()
        ))
        .unwrap();
        for (section, values) in more {
            let empty = toml::Value::Table(toml::Table::new());
            let table = settings.entry(section).or_insert(empty).as_table_mut().unwrap();
            for (key, value) in values.as_table().unwrap() {
                table.entry(key).or_insert(value.clone());
            }
        }
        fs::write(self.setup.path("medes.toml"), settings.to_string()).unwrap();
    }

    fn wait_until_healthy(&mut self) -> Result<(), String> {
        let start = Instant::now();
        let mut ended = None;
        while start.elapsed() < LIMIT {
            if self.client.is_healthy() {
                return Ok(());
            }
            ended = self.child.as_mut().expect("it runs").try_wait().unwrap();
            if ended.is_some() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err(ended.map_or("it does not answer".into(), |status| format!("it ended ({status})")))
    }
}

impl Drop for Platform {
    /// After a test that failed: nothing may disturb those that follow.
    fn drop(&mut self) {
        // A clean end removes it.
        let keeper_log = fs::read(self.run_dir().join("keeper.log")).unwrap_or_default();
        if let Some(child) = &mut self.child
            && matches!(child.try_wait(), Ok(None))
        {
            let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM);
            if !eventually(|| !matches!(child.try_wait(), Ok(None))) {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
        remains::clear_away(self.setup.directory.path(), &self.cgroup(), self.uid_base());
        if std::thread::panicking() {
            eprintln!("--- the platform's log ---\n{}", client::tail(&self.log(), 60));
            eprintln!(
                "--- its keeper's log ---\n{}",
                client::tail(&String::from_utf8_lossy(&keeper_log), 60)
            );
        }
    }
}

/// Waits until `condition` holds; false if it never does.
pub fn eventually(mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if condition() {
            return true;
        }
        if start.elapsed() > LIMIT {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The program under test.
pub fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_medes"))
}

/// The directory with the functions that these tests deploy.
pub fn functions() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/functions")
}

/// What `make test` prepares below the repository's root.
pub fn prepared(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let path = root.join(".cache").join(name);
    assert!(path.exists(), "{} is not there: `make test` prepares it", path.display());
    path
}

/// The name of the runtime that functions are deployed with.
pub fn runtime() -> String {
    let mut names: Vec<_> = fs::read_dir(runtimes())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("python"))
        .collect();
    names.sort();
    names.pop().expect("`make test` installs a runtime")
}

/// The interpreter that the runtime was made of.
pub fn interpreter() -> PathBuf {
    let record = fs::read(runtimes().join(runtime()).join("runtime.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    record["interpreter"].as_str().unwrap().into()
}

fn runtimes() -> PathBuf {
    prepared("runtimes")
}

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}
