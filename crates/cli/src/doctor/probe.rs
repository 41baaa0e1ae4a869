//! What a backend's libraries say of themselves and the machine, asked in a process of its own.

use std::io::Read;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use longspan::{Error, Finding};

use crate::failure::{Failure, Result};
use crate::report::{Table, say};

/// How long a process may take. A driver that starts takes seconds.
const LIMIT: Duration = Duration::from_secs(60);

/// Prints what `backend` finds: the other side of [`ask`].
///
/// # Errors
/// [`Failure::Input`] if it is not in this build.
pub fn answer(backend: &str) -> Result<()> {
    let findings = longspan::findings(backend)
        .ok_or_else(|| Failure::Input(format!("the backend `{backend}` is not in this build")))?;
    say(&table(&findings))
}

/// What `backend` finds, from a process of its own; if that fails, what happened to it.
pub fn ask(backend: &str) -> String {
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(e) => return format!("  not asked: this program can't be found again ({e})\n"),
    };
    let mut command = Command::new(program);
    command.args(["doctor", "--probe", backend]);
    match output_within(&mut command, LIMIT) {
        Ok((status, text)) if status.success() => text,
        Ok((status, text)) => {
            format!("{text}  its libraries ended the process that loaded them ({status}): one of them is broken\n")
        }
        Err(why) => format!("  {why}\n"),
    }
}

/// What `command` writes to stdout and how it ended, unless it takes longer than `limit`.
fn output_within(command: &mut Command, limit: Duration) -> Result<(ExitStatus, String), String> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("not asked: no process could be started ({e})"))?;
    let mut pipe = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.as_mut().map(|p| p.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let start = Instant::now();
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Ok((status, reader.join().unwrap_or_default())),
            Ok(None) if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(10)),
            _ => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("its libraries did not answer within {} s: one of them hangs", limit.as_secs()));
            }
        }
    }
}

fn table(findings: &[Finding]) -> String {
    let mut table = Table::new(&["what", "found", "which, or how to get it"]);
    for finding in findings {
        let (found, text) = match &finding.state {
            Ok(text) => ("yes", text.clone()),
            // Why is a list of every place that was tried; the table of files has said where it is.
            Err(Error::Unavailable { how_to_get_it, why, .. }) if why.len() > 100 => ("no", how_to_get_it.clone()),
            Err(Error::Unavailable { how_to_get_it, why, .. }) => ("no", format!("{why}. To get it: {how_to_get_it}")),
            Err(other) => ("no", other.to_string()),
        };
        table.row([finding.what.clone(), found.to_owned(), text]);
    }
    table.render()
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Result<(ExitStatus, String), String> {
        output_within(Command::new("sh").args(["-c", script]), limit)
    }

    #[test]
    fn a_process_that_ends_badly_or_hangs_is_told_apart() {
        let (status, text) = shell("echo said", Duration::from_secs(60)).expect("it ends");
        assert!(status.success() && text == "said\n");
        let (status, _) = shell("kill -ABRT $$", Duration::from_secs(60)).expect("it ends");
        assert!(!status.success());
        let why = shell("exec sleep 600", Duration::from_millis(50)).expect_err("it hangs");
        assert!(why.contains("hangs"), "{why}");
    }

    #[test]
    fn what_is_missing_says_how_to_get_it() {
        let missing = |why: &str| {
            let (library, how_to_get_it) = ("libx".to_owned(), "install x".to_owned());
            Finding::new("x", Err(Error::Unavailable { library, why: why.to_owned(), how_to_get_it }))
        };
        let text =
            table(&[missing("it is not there"), missing(&"y".repeat(101)), Finding::new("GPU 0", Ok("good".into()))]);
        assert_eq!(text.matches("install x").count(), 2, "{text}");
        assert!(text.contains("it is not there") && !text.contains("yyyy") && text.contains("good"), "{text}");
    }
}
