-- What happened to sandboxes, for those who want to hear of it.

alter table teams add column last_event bigint not null default 0;

-- Why it has its status, where that was not asked for; of its last change.
alter table sandboxes add column status_reason text;

create table sandbox_events (
  team_id text not null,
  -- Counted per team, without gaps, in the order of commits: ADR 17.
  number bigint not null check (number > 0),
  sandbox_id text not null,
  previous_status text,
  status text not null,
  reason text,
  error_code text,
  error_message text,
  host_id text,
  created_at timestamptz(3) not null default clock_timestamp(),
  primary key (team_id, number)
);
create index sandbox_events_of_sandbox on sandbox_events (sandbox_id, number);
create index sandbox_events_by_age on sandbox_events (created_at);

-- In the statement that changes a status, whichever it is: nobody can forget it.
-- Teams' rows are locked in the order of their ids, after sandboxes' and before
-- the digests of hosts: triggers run in the order of their names.
create function record_new_sandboxes() returns trigger language plpgsql as $$
begin
  perform from teams where id in (select team_id from changed_to) order by id for no key update;
  with counted as (
    update teams set last_event = last_event + changes.count
      from (select team_id, count(*) as count from changed_to group by team_id) as changes
     where id = team_id returning id, last_event - changes.count as before
  )
  insert into sandbox_events (team_id, number, sandbox_id, status, reason, host_id)
  select team_id, before + row_number() over (partition by team_id order by changed_to.id),
         changed_to.id, status, status_reason, host_id
    from changed_to join counted on counted.id = team_id;
  return null;
end $$;

create function record_moved_sandboxes() returns trigger language plpgsql as $$
begin
  -- Most updates change no status.
  perform from teams where id in (
    select to_row.team_id from changed_to as to_row join changed_from as from_row using (id)
     where to_row.status <> from_row.status
  ) order by id for no key update;
  if not found then return null; end if;
  with moved as (
    select to_row.*, from_row.status as previous_status
      from changed_to as to_row join changed_from as from_row using (id)
     where to_row.status <> from_row.status
  ), counted as (
    update teams set last_event = last_event + changes.count
      from (select team_id, count(*) as count from moved group by team_id) as changes
     where id = team_id returning id, last_event - changes.count as before
  )
  insert into sandbox_events (team_id, number, sandbox_id, previous_status, status, reason, error_code,
    error_message, host_id)
  select team_id, before + row_number() over (partition by team_id order by moved.id),
         moved.id, previous_status, status, status_reason, error_code, error_message, host_id
    from moved join counted on counted.id = team_id;
  return null;
end $$;

create trigger sandboxes_events_of_new after insert on sandboxes
  referencing new table as changed_to
  for each statement execute function record_new_sandboxes();
create trigger sandboxes_events_of_moved after update on sandboxes
  referencing old table as changed_from new table as changed_to
  for each statement execute function record_moved_sandboxes();
