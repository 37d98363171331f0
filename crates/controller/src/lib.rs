//! The controller: functions, scheduler, lifecycle.
