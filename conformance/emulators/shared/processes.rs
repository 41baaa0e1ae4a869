//! Compiled into tests of emulators. A test of several processes: each runs the test's own executable again, for that one test.
//!
//! ```text
//! fn test() { let Some(part) = part() else { parent: start(..), hear, tell, kill, end };  child: say, listen, assert }
//! ```

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// Says which part of a test this process is.
const PART: &str = "LONGSPAN_TEST_PART";
/// Begins what a part says, apart from what the test harness prints.
const SAYS: &str = "> ";

/// This process's part of the test; `None` in the process that starts them.
pub fn part() -> Option<u32> {
    std::env::var(PART).ok().and_then(|part| part.parse().ok())
}

/// A part tells the parent something.
pub fn say(text: &str) {
    print!("\n{SAYS}{text}\n");
    std::io::stdout().flush().expect("the parent listens");
}

/// A part waits for a word of the parent.
pub fn listen() -> String {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).expect("the parent speaks");
    line.trim_end().to_owned()
}

/// A part of a test, as its parent sees it. It is killed if the test ends before it.
pub struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

/// Starts part `part` of the test `name`.
pub fn start(name: &str, part: u32, variables: &[(&str, String)]) -> Process {
    let mut command = Command::new(std::env::current_exe().expect("this test has a path"));
    command
        .args(["--exact", name, "--nocapture"])
        .env(PART, part.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    let mut child = command.spawn().expect("this test can run itself");
    let (input, output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
    Process { child, input, output: BufReader::new(output) }
}

impl Process {
    /// The next thing that it says; `None` once it has ended.
    pub fn hear(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.output.read_line(&mut line).expect("UTF-8") == 0 {
                return None;
            }
            if let Some(said) = line.trim_end().strip_prefix(SAYS) {
                return Some(said.to_owned());
            }
        }
    }

    /// Tells it something.
    pub fn tell(&mut self, text: &str) {
        writeln!(self.input, "{text}").expect("it listens");
    }

    /// Kills it as `kill -9` does.
    pub fn kill(&mut self) {
        self.child.kill().expect("it is ours");
    }

    /// Stops it as `kill -STOP` does.
    pub fn stop(&mut self) {
        let stopped = Command::new("kill").args(["-STOP", &self.child.id().to_string()]).status();
        assert!(stopped.expect("there is `kill`").success());
    }

    /// What it says until it ends, and whether it ended well.
    pub fn end(mut self) -> (Vec<String>, bool) {
        let said = std::iter::from_fn(|| self.hear()).collect();
        (said, self.child.wait().expect("it is ours").success())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
