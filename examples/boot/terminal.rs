//! The terminal's mode, and that it is given back however the program ends.

use std::io::{IsTerminal, stdin};
use std::sync::{Mutex, Once, PoisonError};

use nix::sys::termios::{
    InputFlags, LocalFlags, OutputFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr,
    tcsetattr,
};

/// The mode to give back, while it is another one. Global, for a panic must find it too.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal in raw mode. Dropping it, and a panic, give back the mode it was in.
#[must_use]
pub struct Raw(());

impl Raw {
    /// Puts the terminal on standard input into raw mode, if it is a terminal. With `signals`, Ctrl-C and its like still send signals.
    pub fn enter(signals: bool) -> nix::Result<Option<Raw>> {
        if !stdin().is_terminal() {
            return Ok(None);
        }
        let mut mode = tcgetattr(stdin())?;
        let mut before = mode.clone();
        // Found raw: a program that was killed left it so (perhaps this one, by SIGKILL). Giving that back would help nobody.
        if !before.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO) {
            before.input_flags |= InputFlags::ICRNL | InputFlags::IXON;
            before.output_flags |= OutputFlags::OPOST | OutputFlags::ONLCR;
            before.local_flags |= LocalFlags::ICANON
                | LocalFlags::ECHO
                | LocalFlags::ECHOE
                | LocalFlags::ECHOK
                | LocalFlags::ISIG
                | LocalFlags::IEXTEN;
        }
        mode.input_flags.remove(
            InputFlags::IGNBRK
                | InputFlags::BRKINT
                | InputFlags::PARMRK
                | InputFlags::ISTRIP
                | InputFlags::INLCR
                | InputFlags::IGNCR
                | InputFlags::ICRNL
                | InputFlags::IXON,
        );
        // Output processing stays on: our own messages end lines with a line feed alone, and a guest's extra carriage returns do no harm.
        mode.output_flags |= OutputFlags::OPOST | OutputFlags::ONLCR;
        mode.local_flags.remove(
            LocalFlags::ECHO | LocalFlags::ECHONL | LocalFlags::ICANON | LocalFlags::IEXTEN,
        );
        mode.local_flags.set(LocalFlags::ISIG, signals);
        mode.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
        mode.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;

        static PANICS: Once = Once::new();
        PANICS.call_once(|| {
            let report = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                give_back();
                report(panic);
            }));
        });
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        let raw = Raw(());
        tcsetattr(stdin(), SetArg::TCSANOW, &mode)?;
        Ok(Some(raw))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        give_back();
    }
}

/// Gives back the terminal's mode, if it was changed.
pub fn give_back() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // Not after all output, which nobody may read. There is nobody left to tell of a failure.
        let _ = tcsetattr(stdin(), SetArg::TCSANOW, &before);
    }
}
